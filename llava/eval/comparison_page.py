"""The HTML report of `compare`: a number opens its questions, and a question shows what each method kept."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from llava.drawing import Sight, find_view_box
from llava.eval.benchmark import ImageSource, Question, Verdict, index_questions
from llava.eval.compare import RANDOM, Entry, Runner, TaskRuns
from llava.eval.comparison import NOTES, Cell, by_task, list_missing, tabulate
from llava.eval.features import FeatureCache
from llava.eval.report import clean, format_cell
from llava.eval.results import base_key
from llava.files import write_text
from llava.image import load_image, to_data_url
from llava.looks import Look, look_at_images, make_ids
from llava.prompt import choose_conv_mode
from llava.terminal import make_bar

THUMBNAIL = 224
MAX_QUESTIONS, MAX_FAILURES = 60, 12
"""Questions of each benchmark that the report holds with their images: those on which most methods differ from the
full model, and each method's first failures."""

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem;color:#222}table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.15rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,
th:first-child{text-align:left}td a{color:inherit;text-decoration:underline dotted;cursor:pointer}
#list div{cursor:pointer;padding:.1rem .3rem}#list div:hover{background:#eef}figure{display:inline-block;margin:.4rem;
width:230px;vertical-align:top}figcaption{font-size:12px}figure.own{outline:2px solid #a00;outline-offset:3px}
h4{margin:1.5rem 0 0}canvas{background:#eee}.right{color:#060}.wrong{color:#a00}
"""
SCRIPT = """
const data=JSON.parse(document.getElementById('data').textContent);
const $=(t,text,c)=>{const e=document.createElement(t);if(text!==undefined)e.textContent=text;
  if(c)e.className=c;return e};
const clear=()=>['list','one'].map(id=>{const e=document.getElementById(id);e.replaceChildren();return e});
function open_list(task,row,what){
  const [box]=clear(),full=0,runs=data[task].runs;
  if(what==='failures')return open_failures(task,row,box);
  const found=data[task].questions.filter(q=>{const a=q.answers[row],f=q.answers[full];if(!a||!f)return false;
    return what==='flips'?a.correct!==f.correct:what==='tokens'?true:what==='hard'?q.hard:true});
  box.append($('h3',runs[row].label+', '+task+': '+found.length+' of the '+data[task].questions.length+
    ' questions in this file ('+data[task].left_out+' are left out)'));
  for(const q of found){const d=$('div',(q.answers[row].correct?'right ':'wrong ')+q.question,
    q.answers[row].correct?'right':'wrong');d.onclick=()=>open_one(task,q);box.append(d)}
  box.scrollIntoView()}
function open_failures(task,row,box){
  const {label,budget,failures,num_failures}=data[task].runs[row];
  const fits=run=>budget===null||run.budget===null||run.budget===budget;
  box.append($('h3',label+', '+task+': right in the full model, wrong here: '+
    (failures.length<num_failures?'the first '+failures.length+' of ':'')+num_failures+
    ', those that most other methods have right first'));
  for(const {question,right,others} of failures){const q=data[task].questions[question];
    box.append($('h4',q.question),$('p','reference: '+q.reference+'; '+right+' of '+others+' other methods are right'));
    show(task,q,box,fits,row)}
  box.scrollIntoView()}
function open_one(task,q){
  const box=document.getElementById('one');box.replaceChildren($('h3',q.question),$('p','reference: '+q.reference));
  show(task,q,box,()=>true);box.scrollIntoView()}
function show(task,q,box,fits,own){
  data[task].runs.forEach((run,i)=>{const a=q.answers[i];if(!a||!fits(run))return;const f=$('figure'),c=$('canvas');
    if(i===own)f.className='own';
    f.append(c,$('figcaption',run.label+': '+a.text+(a.tokens===null?'':' ('+a.tokens+' tokens)'),
      a.correct?'right':'wrong'));box.append(f);if(!q.image){c.remove();return}
    const im=new Image();im.onload=()=>{c.width=im.width;c.height=im.height;const x=c.getContext('2d');
      x.drawImage(im,0,0);if(a.left)draw_left(x,a.left,q.box,data[task].grid)};im.src=q.image})}
function draw_left(x,left,[l,t,w,h],[rows,cols]){
  const x_of=(c,cols)=>Math.round(l+c*w/cols),y_of=(r,rows)=>Math.round(t+r*h/rows);
  const place=(p,rows,cols)=>{const c=p%cols,r=Math.floor(p/cols),a=x_of(c,cols),b=y_of(r,rows);
    return [a,b,x_of(c+1,cols)-a,y_of(r+1,rows)-b]};
  [...left.levels].forEach((digit,p)=>{const [a,b,c,d]=place(p,rows,cols),level=digit/9;
    if(level<1){x.fillStyle='rgba(255,255,255,'+.78*(1-level)+')';x.fillRect(a,b,c,d)}});
  x.lineWidth=2;x.strokeStyle='#ff3fd1';
  left.centres.forEach(p=>{const [a,b,c,d]=place(p,rows,cols);x.strokeRect(a+1,b+1,c-2,d-2)});
  x.strokeStyle='#ffd60a';if(left.cells)for(let p=0;p<left.cells[0]*left.cells[1];p++)
    x.strokeRect(...place(p,...left.cells))}
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


@dataclass(frozen=True)
class Failure:
    """A question that the full model has right and a method wrong.

    Attributes:
        key: of the question.
        right: other methods that have it right.
        others: other methods that answered it.
    """

    key: str
    right: int
    others: int


def write_page(
    folder: Path, runner: Runner, tasks: Sequence[TaskRuns], cells: Sequence[Cell], times: dict[str, dict[str, float]]
) -> Path:
    """Write `report.html`; returns its path."""
    told = [runs for runs in tasks if runs.results and not runs.missing]
    runner.notify("report.html: what each method keeps")
    with make_bar("report.html", sum(len(one_of_each(runs.results)) for runs in told), "run") as progress:
        data = {runs.task.name: gather(runner, runs, progress.update) for runs in told}
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
    for cell, row in zip(cells, rows, strict=True):
        if cell.label in places:
            row["Failures"] = runs[places[cell.label]]["num_failures"]
    kinds = {"Score": "all", "% of full": "all", "+/-": "flips", "Agree": "flips", "Tokens": "tokens", "Hard": "hard"}
    kinds["Failures"] = "failures"
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


def gather(runner: Runner, runs: TaskRuns, advance: Callable[[], object]) -> dict[str, Any]:
    """Collect the data of one benchmark: its runs, and the questions that are shown, with what each method kept.

    Args:
        runner: of the model.
        runs: of the benchmark.
        advance: is called after each run.
    """
    entries = one_of_each(runs.results)
    questions = index_questions(runs.task.load(runs.root), runs.task.key_fields)
    verdicts = {entry: by_question(runs.results[entry].verdicts) for entry in entries}
    failures = {entry: list_failures(verdicts, entry) for entry in entries}
    shown, left_out = choose_questions(questions, verdicts, entries, failures)
    records = [describe(each, verdicts, entries) for each in shown]
    grid = runner.loaded.model.get_vision_tower().grid
    add_images(runner, shown, records)
    for number, entry in enumerate(entries):
        for record, left in zip(records, find_left(runner, entry, shown), strict=True):
            if record["answers"][number] is not None:
                record["answers"][number]["left"] = left
        advance()
    places = {each.key: number for number, each in enumerate(shown)}
    labels = [
        {
            "label": entry.label,
            "spec": entry.spec,
            "budget": entry.budget,
            "num_failures": len(failures[entry]),
            "failures": [
                {"question": places[each.key], "right": each.right, "others": each.others}
                for each in failures[entry]
                if each.key in places
            ][:MAX_FAILURES],
        }
        for entry in entries
    ]
    return {"runs": labels, "questions": records, "left_out": left_out, "grid": list(grid)}


def one_of_each(entries: Sequence[Entry] | dict[Entry, Any]) -> list[Entry]:
    """Every entry once, and of Random the first seed."""
    found = {(entry.method, entry.budget): entry for entry in reversed(list(entries))}
    return [entry for entry in entries if found[entry.method, entry.budget] is entry or entry.method != RANDOM]


def by_question(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    return {key: each for each in verdicts if each.unit != "pair" and (key := base_key(each)) is not None}


def list_failures(verdicts: Mapping[Entry, Mapping[str, Verdict]], entry: Entry) -> list[Failure]:
    """List what the full model has right and a method wrong, what most other methods have right first.

    Args:
        verdicts: of every entry, by question.
        entry: the method.

    Returns:
        Among equal ones in the order of the benchmark. Other methods are those at the same budget; a spec with a budget
        of its own is compared with all.
    """
    others = [
        own
        for each, own in verdicts.items()
        if not each.is_full
        and each.method != entry.method
        and (each.budget == entry.budget or None in (each.budget, entry.budget))
    ]
    failures = []
    for key, verdict in find_full(verdicts).items():
        if verdict.correct and key in verdicts[entry] and not verdicts[entry][key].correct:
            answered = [own[key].correct for own in others if key in own]
            failures.append(Failure(key, sum(answered), len(answered)))
    return sorted(failures, key=lambda failure: -failure.right)


def find_full(verdicts: Mapping[Entry, Mapping[str, Verdict]]) -> Mapping[str, Verdict]:
    """The full model's verdicts."""
    return next(own for entry, own in verdicts.items() if entry.is_full)


def choose_questions(
    questions: dict[str, Question],
    verdicts: dict[Entry, dict[str, Verdict]],
    entries: Sequence[Entry],
    failures: Mapping[Entry, Sequence[Failure]],
) -> tuple[list[Shown], int]:
    """Choose the questions on which most methods differ from the full model, and the first failures of each.

    Returns:
        The questions, and how many are left out.
    """
    full = find_full(verdicts)
    found = [
        Shown(key, questions[key], sum(key in own and own[key].correct != verdict.correct for own in verdicts.values()))
        for key, verdict in full.items()
        if key in questions
    ]
    found.sort(key=lambda each: -each.flips)
    failed = {failure.key for entry in entries for failure in failures[entry][:MAX_FAILURES]}
    shown = [each for number, each in enumerate(found) if number < MAX_QUESTIONS or each.key in failed]
    return shown, len(found) - len(shown)


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
                "left": None,
            }
            for verdict in own
        ],
    }


def add_images(runner: Runner, shown: Sequence[Shown], records: Sequence[dict[str, Any]]) -> None:
    """Add each question's first image, small, and the part of it that the vision tower sees."""
    model = runner.loaded.model
    aspect_ratio, tower = getattr(model.config, "image_aspect_ratio", None), model.get_vision_tower()
    for each, record in zip(shown, records, strict=True):
        if not each.question.images:
            continue
        image = load_image(each.question.images[0])
        left, top, right, bottom = find_view_box(image.size, aspect_ratio, Sight(tower.squeezes, tower.covered))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        scale = image.width / max(1, load_image(each.question.images[0]).width)
        record["box"] = [left * scale, top * scale, (right - left) * scale, (bottom - top) * scale]
        record["image"] = to_data_url(image.convert("RGB"), "JPEG", quality=80)


@torch.inference_mode()
def find_left(runner: Runner, entry: Entry, shown: Sequence[Shown]) -> list[dict[str, Any] | None]:
    """What a method leaves of each question's first image; None for the full model, and without a readable image."""
    model, processor = runner.loaded.model, runner.loaded.image_processor
    model.set_token_reduction(entry.spec)
    if entry.is_full:
        return [None] * len(shown)
    sources: list[ImageSource] = [image for each in shown for image in each.question.images]
    cache = FeatureCache(model, processor, len(sources), runner.store)
    encoded, _ = cache.encode(sources)
    cache.close()
    conv_mode = choose_conv_mode(runner.place.conv_mode, runner.place.spec.name)
    left: list[dict[str, Any] | None] = []
    for question in (each.question for each in shown):
        images = [encoded[image] for image in question.images if image in encoded]
        if not images or len(images) < len(question.images):
            left.append(None)
            continue
        ids = make_ids(model, question.prompt, len(images), conv_mode)
        features, sizes = [image.features for image in images], [image.size for image in images]
        left.append(describe_look(look_at_images(model, features, sizes, question.query, ids)[0]))
    return left


def describe_look(look: Look) -> dict[str, Any]:
    """What the page draws of a look.

    Returns:
        "levels", a digit for each patch: the share of the layers that read it, from 0 to 9; "centres", numbers of the
        patches that merged tokens are made around; "cells", rows and columns that the patches are averaged to, or None.
    """
    num_layers = look.stages[-1].after
    levels = sum(stage.kept.float() * (stage.after - stage.first) / num_layers for stage in look.stages)
    centres = [] if look.centres is None else look.centres.nonzero().flatten().tolist()
    levels[centres] = 1
    if look.cells is not None:
        levels = torch.ones_like(levels)
    digits = "".join(str(round(9 * level)) for level in levels.tolist())
    return {"levels": digits, "centres": centres, "cells": look.cells}
