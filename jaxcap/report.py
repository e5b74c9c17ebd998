"""What a run did, to look at: one self-contained HTML page, and contact sheets of captioned photos."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jaxcap import config as configs
from jaxcap import plots, report_photos, report_words, runs, style
from jaxcap.errors import UserError
from jaxcap.explain import Explanation
from jaxcap.report_photos import Sample
from jaxcap.report_words import Words

_SCORES = {  # title, format, what it means
    "bleu1": ("BLEU-1", "{:.1f}", ""),
    "bleu2": ("BLEU-2", "{:.1f}", ""),
    "bleu3": ("BLEU-3", "{:.1f}", ""),
    "bleu4": ("BLEU-4", "{:.1f}", "runs of up to four words that a reference has too; 0–100, as coco-caption counts"),
    "cider": ("CIDEr", "{:.3f}", "likeness to all references, in which rare words count more; 0–10"),
    "rouge_l": ("ROUGE-L", "{:.3f}", "longest row of words in common with a reference; 0–1"),
    "colours_right": ("Colours right", "{:.1%}", ""),
    "shapes_right": ("Shapes right", "{:.1%}", ""),
    "colours_and_shapes_right": ("Colours and shapes right", "{:.1%}", "captions that pair them as the photo does"),
    "in_train": ("Word for word in train", "{:.1%}", "captions that somebody wrote for a training photo"),
    "distinct": ("Distinct captions", "{:.1%}", ""),
    "words": ("Words a caption", "{:.1f}", ""),
    "vocabulary": ("Different words used", "{:,.0f}", ""),
    "photos_scored": ("Photos", "{:,.0f}", ""),
}
_PARTS = {"scores": "Scores", "training": "Training", "words": "Words", "maps": "Attention", "photos": "Photos"}
_TILES = ("bleu4", "cider", "colours_and_shapes_right", "in_train")


def write(run_dir: Path, *, title: str, scores: Mapping[str, Mapping], samples: Sequence[Sample],
          history: Sequence[Mapping], words: Words | None = None,
          maps: Sequence[tuple[Sample, Explanation]] = ()) -> Path:
    """Writes `run_dir/report.html`, with the run's config if there is one, and returns its path.

    Args:
      scores: by split, as `metrics.score` names them; other numbers are shown under their own name.
      samples: photos to show, in any order; they are sorted by CIDEr.
      history: lines of metrics.jsonl.
      words: what the captions are made of.
      maps: photos with what the captioner looked at.

    Raises `UserError` if the page cannot be written or config.json is damaged.
    """
    run_dir = Path(run_dir)
    config = runs.read_config(run_dir) if (run_dir / "config.json").exists() else None
    parts = {"scores": f'<div class="pair" id="scores">{_scores(scores)}{_config(config)}</div>', "training": _curves(history),
             "words": report_words.sections(words), "maps": report_photos.maps(maps), "photos": report_photos.photos(samples)}
    body = _header(title, config, scores, history, [name for name, part in parts.items() if part]) + "".join(parts.values())
    path = run_dir / "report.html"
    temporary = path.with_name("report.html.tmp")
    try:
        temporary.write_text(style.PAGE.substitute(title=escape(title), style=style.CSS, body=body),
                             encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"the report {path} cannot be written: {error.strerror or error}") from error
    return path


def caption_grid(images: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 4, side: int = 224,
                 font_file: str | None = None) -> Image.Image:
    """A contact sheet: photos (uint8 [H, W, 3]) stretched to `side` × `side` pixels, each with its caption below.

    Pillow's own font has English letters only; give the file of another one (TrueType, OpenType) for the rest.
    """
    gap = side // 14
    font = ImageFont.truetype(font_file, gap) if font_file else ImageFont.load_default(gap)
    texts = ["\n".join(_wrapped(caption, font, side)) for caption in captions]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [pen.multiline_textbbox((0, 0), text, font)[3] for text in texts]
    rows = [range(start, min(start + columns, len(texts))) for start in range(0, len(texts), columns)]
    tall = [side + gap + max(heights[i] for i in row) + gap for row in rows]
    sheet = Image.new("RGB", (gap + (side + gap) * min(columns, len(texts)), gap + sum(tall)), "white")
    pen, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, tall):
        for column, i in enumerate(row):
            left = gap + column * (side + gap)
            sheet.paste(Image.fromarray(images[i]).resize((side, side), Image.Resampling.LANCZOS), (left, top))
            pen.multiline_text((left, top + side + gap // 2), texts[i], "black", font)
        top += height
    return sheet


# --- sections ------------------------------------------------------------------------------------------------------


def _header(title: str, config: configs.Config | None, scores: Mapping, history: Sequence[Mapping], parts: Sequence[str]) -> str:
    said = []
    if config:
        said.append(f"{config.encoder.name} encoder and {configs.decoder_name(config)} decoder on {config.data.name}")
    training = [line for line in history if "loss" in line]
    if training:
        before = [0, *(line["step"] for line in training)]
        seconds = sum(_number(line, "step_ms") * (line["step"] - step) for line, step in zip(training, before)) / 1000
        said.append(f"{training[-1]['step']:,} steps" + (f" in {_duration(seconds)}" if seconds > 0 else ""))
    tiles = ""
    for split, row in list(scores.items())[:1]:
        names = {key: f"{_SCORES[key][0]}, {escape(split)}" for key in _TILES if key in row}
        tiles = "".join(f'<div class="tile"><b>{_cell(row, key)}</b><span>{name}</span></div>'
                        for key, name in names.items())
    links = " ".join(f'<a href="#{part}">{_PARTS[part]}</a>' for part in parts)
    return (f'<header><h1>{escape(title)}</h1><p class="lead">{escape("; ".join(said))}</p><nav>{links}</nav>'
            f'<div class="tiles">{tiles}</div></header>')


def _scores(scores: Mapping[str, Mapping]) -> str:
    if not scores:
        return '<section><h2>Scores</h2><p class="none">This run was not scored.</p></section>'
    own = dict.fromkeys(key for row in scores.values() for key, value in row.items()
                        if key not in (*_SCORES, "step") and isinstance(value, (int, float)))
    keys = [*(key for key in _SCORES if any(key in row for row in scores.values())), *own]
    head = "".join(f'<th scope="col">{escape(split)}</th>' for split in scores)
    rows = "".join(f'<tr><th scope="row">{_name(key)}</th>'
                   + "".join(f"<td>{_cell(row, key)}</td>" for row in scores.values()) + "</tr>" for key in keys)
    return (f'<section><h2>Scores</h2><div class="box scroll"><table><thead><tr><td></td>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div></section>")


def _name(key: str) -> str:
    title, _, meaning = _SCORES.get(key, (key, "", ""))
    return escape(title) + (f"<small>{escape(meaning)}</small>" if meaning else "")


def _curves(history: Sequence[Mapping]) -> str:
    if not history:
        return ""
    unit, places, phases = _places(history)
    training = [(x, line) for x, line in zip(places, history) if "loss" in line]
    splits = dict.fromkeys(line["split"] for line in history if "split" in line)

    def curve(label, key, kind="line"):
        return plots.Curve(label, [(x, _number(line, key)) for x, line in training], kind)

    def scored(title, key):
        dots = [plots.Curve(split, [(x, _number(line, key)) for x, line in zip(places, history) if line.get("split") == split],
                            "dots") for split in splits]
        known = any(math.isfinite(y) for curve in dots for _, y in curve.points)
        return plots.chart(title, dots, **common) if known else ""

    common = {"x_range": (0, max(places)), "x_label": unit, "marks": phases}
    more = [plots.chart(title, [curve("", key)], shown=0.95, **common)
            for key, title in (("reward", "Reward"), ("grad_norm", "Gradient norm")) if any(key in line for _, line in training)]
    charts = (
        plots.chart("Loss", [curve("smoothed", "loss_smooth"), curve("batch", "loss", "faint")], shown=0.995, **common),
        plots.chart("Learning rate", [curve("", "learning_rate")], from_zero=True, **common),
        scored("BLEU-4", "bleu4"), scored("CIDEr", "cider"), *more,
        plots.chart("Step time, ms", [curve("", "step_ms")], from_zero=True, shown=0.95, **common))
    return f'<section id="training"><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


def _places(history: Sequence[Mapping]) -> tuple[str, list[float], list[tuple[float, str]]]:
    """The x axis: its name, where on it each line stands, where each phase begins.

    In epochs since the run began, or in steps if a line does not tell its epoch.
    """
    if not all("epoch" in line for line in history):
        starts = {}
        for line in history:
            starts.setdefault(line.get("phase"), line["step"])
        return "step", [line["step"] for line in history], [(x, name) for name, x in starts.items() if name]
    places, phases, before, latest = [], [], 0.0, 0.0
    for line in history:  # `epoch` counts within a phase
        if "phase" in line and (not phases or line["phase"] != phases[-1][1] or line["epoch"] < latest):
            before += latest
            phases.append((before, line["phase"]))
        latest = line["epoch"]
        places.append(before + latest)
    return "epoch", places, phases


def _config(config: configs.Config | None) -> str:
    if config is None:
        return ""
    data, encoder, decoder, search = config.data, config.encoder, config.decoder, config.search
    distortions = [name for name, on in dataclasses.asdict(config.augment).items() if on]
    rows = [("data", f"{data.name} {data.label}".strip() + f", photos {data.size} × {data.size}; "
             f"trained on {data.train}, scored on {data.val}"),
            ("encoder", f"{encoder.name}, {encoder.weights or 'random'} weights, "
             f"sees {configs.encoder_size(config)} px, {encoder.dtype}"),
            ("distortions", ", ".join(distortions) or "none"),
            ("decoder", f"{configs.decoder_name(config)}, {decoder.hidden} units, embedding {decoder.embedding}, "
             f"dropout {decoder.dropout:g}"),
            *((f"phase {number}: {phase.name}", _phase(phase)) for number, phase in enumerate(config.phases, 1)),
            ("search", _search(search)),
            ("batch", f"{config.batch_size} photos a step; seed {config.seed}")]
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    whole = escape(json.dumps(configs.to_dict(config), indent=2, ensure_ascii=False))
    table = f'<table class="config"><tbody>{cells}</tbody></table>'
    return (f'<section><h2>Configuration</h2><div class="box scroll">{table}</div>'
            f"<details><summary>The whole configuration</summary><pre>{whole}</pre></details></section>")


def _search(search: configs.Search) -> str:
    """How captions are found, with every setting that is not as it comes."""
    said = [f"{search.beam} drawn captions" if search.sample else f"beam {search.beam}", f"at most {search.max_words} words"]
    for setting in dataclasses.fields(search):
        value = getattr(search, setting.name)
        if value != setting.default and setting.name not in ("beam", "max_words", "sample"):
            shown = "" if value is True else " ".join(value) if isinstance(value, tuple) else value
            said.append(f"{setting.name.replace('_', ' ')} {shown}".rstrip())
    return ", ".join(said)


def _phase(phase: configs.Phase) -> str:
    length = f"{phase.epochs:g} epoch{'s' * (phase.epochs != 1)}" if phase.epochs else f"{phase.steps:,} steps"
    trained = "encoder and decoder" if phase.train == "all" else "decoder only"
    optim = phase.optim
    aims = {"words": "aim: a caption's words in no order, ", "reward": "aim: CIDEr-D of its own captions, "}
    aim = aims.get(phase.objective, "")
    return (f"{trained}, {aim}{length}, {optim.name} at {optim.learning_rate:g} ({optim.schedule}), "
            f"batch norm: {phase.batch_norm}")


# --- pieces --------------------------------------------------------------------------------------------------------


def _cell(row: Mapping, key: str) -> str:
    value = _number(row, key)
    form = _SCORES[key][1] if key in _SCORES else "{:.4g}"
    return form.format(value) if math.isfinite(value) else "–"


def _number(row: Mapping, key: str, otherwise: float = math.nan) -> float:
    """A number of a line or of scores; what is missing, null or not finite is `otherwise`."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float, np.number)) and math.isfinite(value) else otherwise


def _duration(seconds: float) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks or, inside a longer word, anywhere."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
