"""A report as one HTML file: no script, no other file, light and dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bixse.evaluation import charts
from bixse.evaluation.report import MAIN

_NAMES = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "recall@10": "Recall@10",
    "recall@100": "Recall@100",
    "judged@10": "Judged@10",
}
_COLOURS = ("var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)")

_LOSS_NOTE = """<p class="soft">Loss of each batch before its step: thin. Mean over neighbouring
steps: bold.</p>"""

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1d1f; --soft: #686b71;
  --rule: #e3e3df; --s0: #8a8f98; --s1: #3b7dd8; --s2: #d9662b; --s3: #7b52c4;
  --good: #2f8f5b; --bad: #c8453b; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e9e9e7;
  --soft: #9a9da3; --rule: #303338; --s0: #9aa0aa; --s1: #6aa5f2; --s2: #f08a52; --s3: #a98aea;
  --good: #55bd85; --bad: #ec7a70; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 1.06rem; margin: 0 0 14px; }
h3 { font-size: .92rem; margin: 0 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 12px; } .soft { color: var(--soft); font-size: .92rem; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 22px 24px; margin-top: 20px; overflow-x: auto; }
.head { font-size: 1.15rem; margin: 18px 0 0; }
.head b { font-size: 2.1rem; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr));
  gap: 22px 32px; }
@media (max-width: 520px) { .panels { grid-template-columns: 1fr; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 10px; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-size: .82rem; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .left { text-align: left; }
tr:last-child td { border-bottom: 0; }
td small { display: block; color: var(--soft); font-size: .78rem; white-space: nowrap; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: 8px; }
.mono { font-family: ui-monospace, Consolas, monospace; font-size: .82rem; word-break: break-all; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; } svg .name { fill: var(--ink); font-size: 14px; }
svg .value { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
details { margin-top: 10px; }
details summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 12px; }
"""


_DEV_NOTE = """<p class="soft">nDCG@10 on the dev split at each evaluation, step 0 being the base;
the dot is the best, whose encoder was kept. It was chosen by this number, so the number flatters
it.</p>"""


def page(
    report: Mapping[str, Any],
    losses: Sequence[tuple[float, float]] = (),
    dev: Sequence[tuple[float, float]] = (),
) -> str:
    """The page of `report.json`.

    `losses` are (step, loss) of the training and `dev` its (step, nDCG@10) on the dev split, if
    they are known.
    """
    title = f"{report['recipe']}: {report['split']} split"
    body = [
        f"<h1>{escape(report['recipe'])}</h1>",
        f'<p class="soft">{_extent(report)}</p>',
        _headline(report),
        _section("Systems", _means(report)),
        _section("Means and 95 % intervals", _panels(report)),
        _section("Differences on the same queries", _differences(report)),
        *(_changes(pair, found) for pair, found in list(report["changes"].items())[:2]),
    ]
    if losses:
        body.append(_section("Training loss", charts.curve(losses) + _LOSS_NOTE))
    if dev:
        body.append(_section("Dev split while training", charts.scores(dev) + _DEV_NOTE))
    body += [_section("How it was measured", _method(report)), _lineage(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _extent(report: Mapping[str, Any]) -> str:
    return (
        f"{escape(report['split'])} split: {report['n_queries']:,} queries with "
        f"{report['n_judgments']:,} judgments, against all {report['n_documents']:,} documents"
    )


def _headline(report: Mapping[str, Any]) -> str:
    pair = next(iter(report["differences"]), None)
    if pair is None:
        return ""
    system, against = pair.split("-")
    found = report["differences"][pair][MAIN]
    low, high = found["ci95"]
    style = _tone(found)
    why = "the interval holds 0" if low <= 0 <= high else "p is not below 0.05"
    verdict = "" if style else f": {why}, so this is no proof of a change"
    if report.get("chosen_on_split"):
        verdict += "; the trained encoder was chosen on these queries, which flatters it"
    return (
        f'<p class="head">nDCG@10 of {escape(system)} against {escape(against)}: '
        f'<b class="{style}">{found["mean"]:+.3f}</b> '
        f"[{low:+.3f}, {high:+.3f}], p = {_p(found['p'])}{verdict}</p>"
    )


def _means(report: Mapping[str, Any]) -> str:
    measures = list(report["ci95"])
    rows = []
    for system, colour in _colours(report).items():
        cells = "".join(
            f"<td>{report[name][system]:.3f}<small>{_range(report['ci95'][name][system])}</small>"
            "</td>"
            for name in measures
        )
        dot = f'<span class="dot" style="background:{colour}"></span>'
        rows.append(f"<tr><td>{dot}{escape(system)}</td>{cells}</tr>")
    return _table(["", *(_NAMES[name] for name in measures)], rows)


def _panels(report: Mapping[str, Any]) -> str:
    panels = [
        f"<div><h3>{_NAMES[name]}</h3>"
        f"{charts.dots(report[name], report['ci95'][name], _colours(report))}</div>"
        for name in report["ci95"]
        if name != "judged@10"
    ]
    return f'<div class="panels">{"".join(panels)}</div>'


def _differences(report: Mapping[str, Any]) -> str:
    measures = [name for name in report["ci95"] if name != "judged@10"]
    rows = []
    for pair, found in report["differences"].items():
        cells = "".join(
            f'<td class="{_tone(found[name])}">{found[name]["mean"]:+.3f}'
            f"<small>{_range(found[name]['ci95'], '+')}</small>"
            f"<small>p = {_p(found[name]['p'])}</small></td>"
            for name in measures
        )
        rows.append(f"<tr><td>{escape(pair.replace('-', ' against '))}</td>{cells}</tr>")
    return _table(["", *(_NAMES[name] for name in measures)], rows)


def _changes(pair: str, found: Mapping[str, Any]) -> str:
    system, against = pair.split("-")
    counts = (
        f'<p class="soft"><span class="good">{found["better"]:,} better</span>, '
        f'<span class="bad">{found["worse"]:,} worse</span>, {found["same"]:,} the same</p>'
    )
    tables = [
        f"<details{opened}><summary>{label}</summary>"
        f"{_examples(found[name], system, against)}</details>"
        for name, label, opened in (
            ("worst", "Lost most", ' open="open"'),
            ("best", "Gained most", ""),
        )
        if found[name]
    ]
    content = counts + charts.waterfall(found["sorted"]) + "".join(tables)
    return _section(f"nDCG@10 query by query: {system} against {against}", content)


def _examples(examples: Sequence[Mapping[str, Any]], system: str, against: str) -> str:
    rows = [
        f'<tr><td>{escape(row["text"])}<small class="mono">{escape(row["query_id"])}</small></td>'
        f"<td>{row[against]:.3f}</td><td>{row[system]:.3f}</td>"
        f'<td class="{"good" if row["change"] > 0 else "bad"}">{row["change"]:+.3f}</td></tr>'
        for row in examples
    ]
    return _table(["query", escape(against), escape(system), "change"], rows)


def _method(report: Mapping[str, Any]) -> str:
    settings, empty = report["config"]["evaluation"], report["queries"]
    unjudged = ", ".join(f"{name} {count:,}" for name, count in report["unjudged@10"].items())
    depth = report["config"].get("rerank_depth")
    reread = f" A reranker puts the first {depth} of a ranking into its order." if depth else ""
    themselves = empty.get("themselves")
    own = f" {themselves:,} are documents too, and do not find themselves." if themselves else ""
    return (
        f"<p>Every system ranks all {report['n_documents']:,} documents; the first "
        f"{settings['depth']} are kept.{reread} The gain of a document in nDCG is its "
        "relevance, linear. "
        f"For Recall and MRR a document is relevant from {settings['relevant_from']:g} on. "
        "Documents without a judgment have gain 0; Judged@10 is the share of the first ten that "
        f"have one (unjudged: {escape(unjudged)}).</p>"
        f"<p>Every judged query counts. {empty['no_gain']:,} have no document with a gain and "
        f"{empty['none_relevant']:,} none that is relevant: they count 0 for every system.{own}"
        f"{_rejected(report.get('qrels', {}))}</p>"
        f"<p>Intervals: percentile bootstrap over queries, {settings['bootstrap']:,} resamples, "
        "the same ones for all systems. p: paired randomisation test, two-sided, not corrected "
        "for the number of comparisons.</p>"
    )


def _rejected(qrels: Mapping[str, Any]) -> str:
    if not qrels.get("rejected"):
        return ""
    reasons = ", ".join(f"{why} ({count:,})" for why, count in qrels["rejected_for"].items())
    return (
        f" {qrels['rejected']:,} lines of the qrels, of all splits, were rejected and measure "
        f"nothing: {escape(reasons)}."
    )


def _lineage(report: Mapping[str, Any]) -> str:
    groups = (
        ("fingerprint", report["fingerprints"]),
        ("version", report["versions"]),
        ("seconds", {name: f"{value:,.1f}" for name, value in report["seconds"].items()}),
    )
    tables = [
        _table(
            [label, ""],
            [
                f'<tr><td>{escape(name)}</td><td class="mono">{escape(str(value))}</td></tr>'
                for name, value in values.items()
            ],
        )
        for label, values in groups
        if values
    ]
    return (
        "<section><details><summary>What it was made from</summary>"
        f"{''.join(tables)}</details></section>"
    )


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    cells = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _colours(report: Mapping[str, Any]) -> dict[str, str]:
    return {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(report[MAIN])}


def _range(interval: Sequence[float], sign: str = "") -> str:
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _tone(difference: Mapping[str, Any]) -> str:
    """A colour where interval and test both say that it is no chance: a bootstrap of few queries is
    too narrow, of one query it has no width at all."""
    low, high = difference["ci95"]
    if difference["p"] >= 0.05:
        return ""
    return "good" if low > 0 else "bad" if high < 0 else ""


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"
