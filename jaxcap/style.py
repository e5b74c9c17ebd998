"""The report page's frame and look: light and dark, wide and narrow, screen and paper; it loads nothing."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>$body</main>
</body>
</html>
""")

CSS = """
:root {
  --ground: #f7f7f5; --paper: #ffffff; --ink: #1c1e22; --soft: #62666e; --line: #e2e2de;
  --c0: #2a62c9; --c1: #c4501b; --c2: #2b8a57; --c3: #8a4bb0;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #131519; --paper: #1c1f25; --ink: #e8e9ec; --soft: #9aa0ab; --line: #30343d;
    --c0: #7fa9ff; --c1: #f0955f; --c2: #6fd09c; --c3: #cb9bea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 48px 0 14px; font-size: 1.25rem; }
small { color: var(--soft); font-weight: normal; font-size: .875rem; }
p { margin: 0; }
.lead { margin-top: 6px; color: var(--soft); }
.none { color: var(--soft); }
.box, .tile, .chart, article, pre { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 16px; }
.pair > section { min-width: 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
.tiles:empty { display: none; }
.tile { flex: 1 1 150px; padding: 14px 18px; }
.tile b { display: block; font-size: 1.75rem; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 16px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; }
th:first-child { text-align: left; font-weight: 500; }
th small { display: block; font-size: .8125rem; line-height: 1.35; }
.config td { text-align: left; }
.config th { width: 11em; color: var(--soft); font-weight: 500; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); }
pre {
  overflow-x: auto; margin: 10px 0 0; padding: 14px 18px; font: .8125rem/1.45 ui-monospace, Menlo, Consolas, monospace;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.chart { margin: 0; padding: 14px 18px 10px; }
figcaption { display: flex; justify-content: space-between; gap: 12px; font-weight: 600; }
.keys { display: flex; flex-wrap: wrap; gap: 0 14px; font-weight: normal; font-size: .8125rem; color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0; border-radius: 2px; }
.plot { position: relative; height: 200px; margin: 26px 0 0 46px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; }
.plot .cut { clip-path: inset(0 -8px); }
.plot path { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; }
.plot path { stroke-linecap: round; stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); } .c3 { stroke: var(--c3); }
.key.c0::before { background: var(--c0); } .key.c1::before { background: var(--c1); }
.key.c2::before { background: var(--c2); } .key.c3::before { background: var(--c3); }
.plot .faint { stroke: var(--c0); opacity: .3; stroke-width: 1; }
.key.faint::before { background: var(--c0); opacity: .3; }
.plot .dot { stroke-width: 7; }
.plot span { position: absolute; color: var(--soft); font-size: .75rem; line-height: 1; white-space: nowrap; }
.plot .y { right: 100%; margin-right: 8px; transform: translateY(-50%); font-variant-numeric: tabular-nums; }
.plot .x { top: 100%; margin-top: 8px; transform: translateX(-50%); font-variant-numeric: tabular-nums; }
.plot .phase { bottom: 100%; padding: 0 4px 6px 0; overflow: hidden; text-overflow: ellipsis; }
.axis { margin-top: 24px; text-align: center; color: var(--soft); font-size: .75rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); gap: 16px; }
article { overflow: hidden; }
article img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; }
article .caption { margin: 12px 14px 0; font-weight: 600; line-height: 1.35; overflow-wrap: anywhere; }
article .facts { margin: 4px 14px 0; color: var(--soft); font-size: .8125rem; font-variant-numeric: tabular-nums; }
article ul { margin: 10px 14px 14px; padding: 0; list-style: none; }
article li { color: var(--soft); font-size: .8125rem; line-height: 1.4; }
article li { padding-inline-start: 10px; border-inline-start: 2px solid var(--line); overflow-wrap: anywhere; }
article li + li { margin-top: 5px; }
@media (max-width: 520px) {
  main { padding: 20px 14px 48px; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 36px; }
  .tile { flex-basis: 40%; padding: 10px 14px; }
  .tile b { font-size: 1.375rem; }
  .config th { width: 7.5em; }
}
@media print {
  :root { --ground: #fff; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  html { font-size: 11px; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 20px; break-after: avoid; }
  article, figure, .tile, tr { break-inside: avoid; }
  .pair, .charts { grid-template-columns: 1fr 1fr; }
  .plot { height: 130px; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 10px; }
  .scroll { overflow: visible; }
}
"""
