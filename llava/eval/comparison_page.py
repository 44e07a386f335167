"""The HTML report of `compare`: a number opens its questions, and a question shows what each method kept."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.drawing import find_view_box
from llava.eval.benchmark import ImageSource, Question, Verdict, index_questions
from llava.eval.compare import RANDOM, Entry, Runner, TaskRuns
from llava.eval.comparison import NOTES, Cell, by_task, list_missing, tabulate
from llava.eval.features import FeatureCache
from llava.eval.report import clean, format_cell
from llava.eval.results import base_key
from llava.files import write_text
from llava.image import load_image

THUMBNAIL = 224
MAX_QUESTIONS = 60
"""Questions of each benchmark that the report holds with their images: those on which most methods differ from the
full model come first."""

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem;color:#222}table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.15rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,
th:first-child{text-align:left}td a{color:inherit;text-decoration:underline dotted;cursor:pointer}
#list div{cursor:pointer;padding:.1rem .3rem}#list div:hover{background:#eef}figure{display:inline-block;margin:.4rem;
width:230px;vertical-align:top}figcaption{font-size:12px}canvas{background:#eee}.right{color:#060}.wrong{color:#a00}
"""
SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent);
const $=(t,text,c)=>{const e=document.createElement(t);if(text!==undefined)e.textContent=text;
  if(c)e.className=c;return e};
function open_list(task,row,what){
  const box=document.getElementById('list');box.replaceChildren();document.getElementById('one').replaceChildren();
  const runs=data[task].runs,full=0;
  const found=data[task].questions.filter(q=>{const a=q.answers[row],f=q.answers[full];if(!a||!f)return false;
    return what==='flips'?a.correct!==f.correct:what==='tokens'?true:what==='hard'?q.hard:true});
  box.append($('h3',runs[row].label+', '+task+': '+found.length+' of the '+data[task].questions.length+
    ' questions in this file ('+data[task].left_out+' are left out)'));
  for(const q of found){const d=$('div',(q.answers[row].correct?'right ':'wrong ')+q.question,
    q.answers[row].correct?'right':'wrong');d.onclick=()=>open_one(task,q);box.append(d)}
  box.scrollIntoView()}
function open_one(task,q){
  const box=document.getElementById('one');box.replaceChildren($('h3',q.question),$('p','reference: '+q.reference));
  data[task].runs.forEach((run,i)=>{const a=q.answers[i];if(!a)return;const f=$('figure'),c=$('canvas');
    f.append(c,$('figcaption',run.label+': '+a.text+(a.tokens===null?'':' ('+a.tokens+' tokens)'),
      a.correct?'right':'wrong'));box.append(f);if(!q.image){c.remove();return}
    const im=new Image();im.onload=()=>{c.width=im.width;c.height=im.height;const x=c.getContext('2d');
      x.drawImage(im,0,0);if(!a.kept)return;const [l,t,w,h]=q.box,[rows,cols]=data[task].grid;
      x.fillStyle='rgba(255,255,255,.78)';for(let p=0;p<rows*cols;p++)if(a.kept[p]==='0')
        x.fillRect(l+(p%cols)*w/cols,t+Math.floor(p/cols)*h/rows,w/cols+.5,h/rows+.5)};im.src=q.image});
  box.scrollIntoView()}
"""


@dataclass(frozen=True)
class Shown:
    """A question of the report.

    Attributes:
        key: of the question.
        question: what was asked.
        flips: methods that differ from the full model.
    """

    key: str
    question: Question
    flips: int


def write_page(
    folder: Path, runner: Runner, tasks: Sequence[TaskRuns], cells: Sequence[Cell], times: dict[str, dict[str, float]]
) -> Path:
    """Write `report.html`; returns its path."""
    data = {runs.task.name: gather(runner, runs) for runs in tasks if runs.results and not runs.missing}
    parts = [f"<h1>{escape(clean(runner.place.spec.name))}: methods compared</h1>", f"<p>{escape(NOTES[0])}</p>"]
    for own in by_task(cells):
        parts.append(f"<h2>{escape(own[0].row)}</h2>{table(own, times, data[own[0].task]['runs'])}")
    parts += [f"<p>{escape(clean(line))}</p>" for line in list_missing(tasks)]
    # A script ends at the first "</", wherever that is.
    content = json.dumps(data).replace("<", "\\u003c")
    page = (
        f"<!doctype html><meta charset=utf-8><title>Methods compared</title><style>{STYLE}</style>{''.join(parts)}"
        f"<div id=list></div><div id=one></div><script type=application/json id=data>{content}</script>"
        f"<script>{SCRIPT}</script>\n"
    )
    return write_text(folder / "report.html", page)


def table(cells: Sequence[Cell], times: dict[str, dict[str, float]], runs: Sequence[dict[str, Any]]) -> str:
    """Write a benchmark's table, in which a number opens its questions."""
    rows = tabulate(cells, times)
    places = {run["label"]: number for number, run in reversed(list(enumerate(runs)))}
    kinds = {"Score": "all", "% of full": "all", "+/-": "flips", "Agree": "flips", "Tokens": "tokens", "Hard": "hard"}
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in rows[0]) + "</tr>"]
    for cell, row in zip(cells, rows, strict=True):
        texts = []
        for title, value in row.items():
            text = escape(format_cell(value))
            if title in kinds and cell.label in places:
                call = escape(json.dumps([cell.task, places[cell.label], kinds[title]])[1:-1])
                text = f'<a onclick="open_list({call})">{text}</a>'
            texts.append(f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(texts)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def gather(runner: Runner, runs: TaskRuns) -> dict[str, Any]:
    """Collect the data of one benchmark: its runs, and the questions that are shown, with what each method kept."""
    entries = one_of_each(runs.results)
    questions = index_questions(runs.task.load(runs.root), runs.task.key_fields)
    verdicts = {entry: by_question(runs.results[entry].verdicts) for entry in entries}
    shown, left_out = choose_questions(questions, verdicts, entries)
    records = [describe(each, verdicts, entries) for each in shown]
    grid = runner.loaded.model.get_vision_tower().grid
    add_images(runner, shown, records)
    for number, entry in enumerate(entries):
        for record, kept in zip(records, find_kept(runner, entry, shown), strict=True):
            if record["answers"][number] is not None:
                record["answers"][number]["kept"] = kept
    labels = [{"label": entry.label, "spec": entry.spec} for entry in entries]
    return {"runs": labels, "questions": records, "left_out": left_out, "grid": list(grid)}


def one_of_each(entries: Sequence[Entry] | dict[Entry, Any]) -> list[Entry]:
    """Every entry once, and of Random the first seed."""
    found = {(entry.method, entry.budget): entry for entry in reversed(list(entries))}
    return [entry for entry in entries if found[entry.method, entry.budget] is entry or entry.method != RANDOM]


def by_question(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    return {key: each for each in verdicts if each.unit != "pair" and (key := base_key(each)) is not None}


def choose_questions(
    questions: dict[str, Question], verdicts: dict[Entry, dict[str, Verdict]], entries: Sequence[Entry]
) -> tuple[list[Shown], int]:
    """Choose the questions on which most methods differ from the full model; returns them and how many are left out."""
    full = verdicts[entries[0]] if entries[0].is_full else verdicts[next(entry for entry in entries if entry.is_full)]
    found = [
        Shown(key, questions[key], sum(key in own and own[key].correct != verdict.correct for own in verdicts.values()))
        for key, verdict in full.items()
        if key in questions
    ]
    found.sort(key=lambda each: -each.flips)
    return found[:MAX_QUESTIONS], max(0, len(found) - MAX_QUESTIONS)


def describe(shown: Shown, verdicts: dict[Entry, dict[str, Verdict]], entries: Sequence[Entry]) -> dict[str, Any]:
    """What the page says of a question, without images."""
    own = [verdicts[entry].get(shown.key) for entry in entries]
    first = next(verdict for verdict in own if verdict is not None)
    references = first.reference if isinstance(first.reference, str) else ", ".join(dict.fromkeys(first.reference))
    return {
        "question": clean(shown.question.prompt),
        "reference": clean(references),
        "hard": any(
            entry.method == "Pool" and verdict is not None and not verdict.correct
            for entry, verdict in zip(entries, own, strict=True)
        ),
        "image": None,
        "answers": [
            verdict
            and {
                "text": clean(verdict.prediction),
                "correct": verdict.correct,
                "tokens": verdict.num_tokens,
                "kept": None,
            }
            for verdict in own
        ],
    }


def add_images(runner: Runner, shown: Sequence[Shown], records: Sequence[dict[str, Any]]) -> None:
    """Add each question's first image, small, and the part of it that the vision tower sees."""
    aspect_ratio = getattr(runner.loaded.model.config, "image_aspect_ratio", None)
    for each, record in zip(shown, records, strict=True):
        if not each.question.images:
            continue
        image = load_image(each.question.images[0])
        left, top, right, bottom = find_view_box(image.size, aspect_ratio)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        scale = image.width / max(1, load_image(each.question.images[0]).width)
        record["box"] = [left * scale, top * scale, (right - left) * scale, (bottom - top) * scale]
        record["image"] = to_data_uri(image)


def to_data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


@torch.inference_mode()
def find_kept(runner: Runner, entry: Entry, shown: Sequence[Shown]) -> list[str | None]:
    """What a method keeps of each question's first image, a 0 or 1 per patch; None where it keeps no patches."""
    model, processor = runner.loaded.model, runner.loaded.image_processor
    model.set_token_reduction(entry.spec)
    if model.token_reducer is None:
        return [None] * len(shown)
    images: list[ImageSource] = [each.question.images[0] for each in shown if each.question.images]
    cache = FeatureCache(model, processor, len(images), runner.store)
    encoded, _ = cache.encode(images)
    cache.close()
    kept: list[str | None] = []
    for each in shown:
        image = each.question.images[0] if each.question.images else None
        if image not in encoded:
            kept.append(None)
            continue
        (reduced,) = model.choose_tokens([encoded[image].features], [each.question.query])
        marks = [marked for marked in (reduced.kept, reduced.centres) if marked is not None]
        kept.append("".join(map(str, torch.stack(marks).any(dim=0)[0].int().tolist())) if marks else None)
    return kept
