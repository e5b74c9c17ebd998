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
h2 { margin: 48px 0 14px; font-size: 1.25rem; line-height: 1.3; }
small { color: var(--soft); font-weight: normal; font-size: .875rem; }
p { margin: 0; }
.lead { margin-top: 6px; color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 10px; }
a { color: var(--c0); text-underline-offset: 3px; }
.note { margin: 0 0 14px; color: var(--soft); font-size: .875rem; }
.box + .note { margin: 10px 0 14px; }
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
.figures td, .figures thead th, .colour { white-space: nowrap; }
.figures th, .figures td { padding: 6px 12px; }
.figures th:first-child { padding-left: 16px; }
.config td { text-align: left; }
.config th { width: 11em; color: var(--soft); font-weight: 500; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: 6px; }
.swatch { border: 1px solid var(--soft); border-radius: 50%; }
.swatch, .key::before { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); }
pre {
  overflow-x: auto; margin: 10px 0 0; padding: 14px 18px; font: .8125rem/1.45 ui-monospace, Menlo, Consolas, monospace;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
.thirds { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 16px; align-items: start; }
.thirds > * { min-width: 0; }
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
.plot rect.c0 { fill: var(--c0); } .plot rect.c1 { fill: var(--c1); }
.plot rect.c2 { fill: var(--c2); } .plot rect.c3 { fill: var(--c3); }
.plot rect { stroke: none; }
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
.strips { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; align-items: start; }
.seen ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 10px; }
.seen ol { margin: 12px 14px 14px; padding: 0; list-style: none; }
.seen li { padding: 0; border: 0; color: var(--ink); }
.seen li + li { margin: 0; }
.seen img { border-radius: 6px; margin-bottom: 4px; }
.seen small { display: block; font-size: .75rem; line-height: 1.2; }
@media (max-width: 520px) {
  main { padding: 20px 14px 48px; }
  h1 { font-size: 1.5rem; }
  h2 { margin-top: 36px; }
  .tile { flex-basis: 40%; padding: 10px 14px; }
  .tile b { font-size: 1.375rem; }
  .figures { font-size: .8125rem; }
  .figures small { font-size: .75rem; }
  .figures th, .figures td { padding: 6px 5px; }
  .figures th:first-child { padding-left: 12px; }
  .figures td:last-child, .figures thead th:last-child { padding-right: 12px; }
  .config th { width: 7.5em; }
}
@media print {
  :root { --ground: #fff; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  html { font-size: 11px; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 20px; break-after: avoid; }
  article, figure, .tile, tr { break-inside: avoid; }
  .pair, .charts, .strips { grid-template-columns: 1fr 1fr; }
  .thirds { grid-template-columns: 1fr 1fr 1fr; }
  .seen ol { grid-template-columns: repeat(6, 1fr); gap: 6px; }
  .plot { height: 130px; }
  nav { display: none; }
  .cards { grid-template-columns: repeat(4, 1fr); gap: 10px; }
  .scroll { overflow: visible; }
}
"""
