"""The report of a comparison: tables in Markdown, a plot, and a summary on the terminal.

All are made from one dictionary, which report.json holds as it is: see `compare.compare`.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np

from models.chain import BuildFolder, replacing

REFERENCE = "pytorch"
LISTED = 10  # rows of a table about single samples


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The report as Markdown."""
    rows = {label: row for label, row in report["executors"].items() if "failed" not in row}
    failed = {label: row["failed"] for label, row in report["executors"].items() if "failed" in row}
    lines = [f"# {title}: comparison with PyTorch", ""]
    lines += [f"- Weights: {report['weights']}", f"- Samples: {report['samples']}, {report['data']}"]
    lines += [f"- Machine: {report['machine']}"]
    versions = sorted({f"{name} {version}" for row in rows.values() for name, version in row["environment"].items()})
    lines += [f"- Versions: {', '.join(versions)}", f"- Date: {report['date']}", ""]
    header, *summary_rows = summary(report)
    lines += table(header, summary_rows)

    lines += ["## Bars", ""]
    bars = [
        [
            label,
            bar["metric"],
            number(bar["value"]),
            f"{'≥' if bar['at_least'] else '≤'} {number(bar['limit'])}",
            "met" if bar["met"] else "**missed**",
        ]
        for label, row in rows.items()
        for bar in row["bars"]
    ]
    lines += table(["executor", "metric", "value", "bar", ""], bars)
    lines += [f"- {label} failed: {problem}" for label, problem in failed.items()] + ([""] if failed else [])

    measured = {label: {**row["score"], **row["difference"]} for label, row in rows.items()}
    measured = {"input": report["input"], **measured}
    metrics = list(dict.fromkeys(key for values in measured.values() for key in values))
    if metrics:
        lines += ["## Result", "", "Scores against the truth, differences against PyTorch, over all samples.", ""]
        lines += table(
            ["executor", *metrics],
            [[label, *(number(values.get(key)) for key in metrics)] for label, values in measured.items() if values],
        )
    lines += side_by_side(report["side_by_side"], labelled=bool(rows[REFERENCE]["score"]))
    lines += difference_tables(rows, report["samples"])
    lines += ["## Error of each part", ""]
    lines += ["Each part gets the inputs that it had in a call late in the PyTorch run; where a size is named, random"]
    lines += ["ones.  Relative errors are to the reference's magnitude, but to no less than 0.1 % of its largest.", ""]
    statistics = list(next(iter(rows[REFERENCE]["errors"].values())))
    lines += table(
        ["output", "executor", *statistics],
        [
            [group, label, *(number(row["errors"][group][name]) for name in statistics)]
            for group in rows[REFERENCE]["errors"]
            for label, row in rows.items()
            if label != REFERENCE and group in row["errors"]
        ],
    )
    lines += ["## Latency", "", "Median (20th to 80th percentile) in ms, transfers included.  Whole: per sample.", ""]
    names = list(next(iter(rows.values()))["part_ms"])
    lines += table(
        ["executor", "whole", *names],
        [
            [label, spread(row["ms_per_item"]), *(spread(row["part_ms"][name]) for name in names)]
            for label, row in rows.items()
        ],
    )
    timed_rows = {label: row["timed_ms"] for label, row in rows.items() if row["timed_ms"]}
    if timed_rows:
        lines += ["## Latency by size", ""]
        lines += [
            "Median (20th to 80th percentile) in ms on the GPU.  Whole calls include transfers, parts do not.",
            "",
        ]
        lines += table(
            ["", *timed_rows],
            [
                [name, *(spread(row[name]) if name in row else "" for row in timed_rows.values())]
                for name in dict.fromkeys(name for row in timed_rows.values() for name in row)
            ],
        )
    lines += layer_table(rows)
    lines += ["![Latency and error](report.png)", ""]
    return "\n".join(lines)


def side_by_side(samples: Sequence[Mapping[str, Any]], labelled: bool) -> List[str]:
    """What the executors made of some samples."""
    if labelled:
        lines = ["## Worst samples", "", "The samples on which PyTorch scores worst, worst first.", ""]
    else:
        lines = ["## Outputs", "", "The first samples.", ""]
    columns = list(dict.fromkeys(key for sample in samples for key in sample["cells"]))
    scores = list(samples[0]["score"])
    return lines + table(
        ["sample", *scores, *columns],
        [
            [
                code(sample["name"]),
                *(number(sample["score"][name]) for name in scores),
                *(cell(sample["cells"].get(column, "")) for column in columns),
            ]
            for sample in samples
        ],
    )


def difference_tables(rows: Mapping[str, Mapping[str, Any]], samples: int) -> List[str]:
    """For each executor the first of the outputs that users would notice to differ from PyTorch's."""
    lines = []
    for label, row in rows.items():
        found = row["differences"]
        if found:
            lines += [f"## Outputs of {label} that differ from PyTorch's", ""]
            lines += [f"{len(found)} of {samples}; report.json lists all.", ""]
            lines += table(list(found[0]), [[cell(value) for value in one.values()] for one in found[:LISTED]])
    return lines


def layer_table(rows: Mapping[str, Mapping[str, Any]]) -> List[str]:
    """What each plugin costs beside the layers that it replaces: at every size, and by module at the first."""
    entries = [(label, *entry) for label, row in rows.items() for entry in row["layer_ms"]]
    if not entries:
        return []
    first = {name.partition(",")[0]: name for _, name, *_ in reversed(entries)}  # size of each part
    modules = {part: {entry[3] for entry in entries if entry[1] == name} - {""} for part, name in first.items()}
    lines = ["## Layer times", ""]
    lines += ["Medians in ms of the layers that do a plugin's work, reformats for them included.  Layers are timed one"]
    lines += ["by one, so that their sum exceeds the latency.", ""]
    lines += sums(["part", "plugin"], [(label, (name, plugin), ms) for label, name, plugin, _, ms in entries])
    by_module = [
        (label, (part, plugin, module or "elsewhere"), ms)
        for part, size in first.items()
        for label, name, plugin, module, ms in entries
        if name == size and len(modules[part]) > 1
    ]
    if by_module:
        lines += ["The same by module of the network, at the size that is timed first.", ""]
        lines += sums(["part", "plugin", "module"], by_module)
    return lines


def sums(columns: Sequence[str], entries: Sequence[Tuple[str, Tuple[str, ...], float]]) -> List[str]:
    """(executor, key, ms) as a table: for each key the executors' sums; keys come in the order of their first parts."""
    labels = list(dict.fromkeys(label for label, _, _ in entries))
    names = list(dict.fromkeys(key[0] for _, key, _ in entries))
    totals: Dict[Tuple[str, ...], Dict[str, float]] = {}
    for label, key, ms in entries:
        times = totals.setdefault(key, {})
        times[label] = times.get(label, 0.0) + ms
    ordered = sorted(totals, key=lambda key: (names.index(key[0]), key))
    rows = [[*key, *(number(totals[key].get(label)) for label in labels)] for key in ordered]
    return table([*columns, *labels], rows)


def summary(report: Mapping[str, Any]) -> List[List[str]]:
    """A header and a row for the input and each executor: speed, scores, differing outputs, largest error, verdict."""
    rows = report["executors"]
    scores = list(rows[REFERENCE]["score"])
    lines = [["executor", "ms per sample", *scores, "differing", "largest error", "bars"]]
    if report["input"]:
        lines.append(["input", "", *(number(report["input"][name]) for name in scores), "", "", ""])
    for label, row in rows.items():
        if "failed" in row:
            lines.append([label, "", *("" for _ in scores), "", "", "failed"])
            continue
        values = [number(row["ms_per_item"]["median"]), *(number(row["score"][name]) for name in scores)]
        if label == REFERENCE:
            lines.append([label, *values, "", "", "reference"])
        else:
            differing = f"{len(row['differences'])} of {report['samples']}"
            error = number(max(group["abs max"] for group in row["errors"].values()))
            verdict = "met" if all(bar["met"] for bar in row["bars"]) else "missed"
            lines.append([label, *values, differing, error, verdict])
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return [*lines, ""]


def cell(value: Union[str, float, Mapping[str, str]]) -> str:
    """A text as it is, a number, or a picture."""
    if isinstance(value, str):
        return code(value)
    return number(value) if isinstance(value, (int, float)) else f"![]({value['picture']})"


def code(text: str) -> str:
    """A text with none of its characters taken for Markdown."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>" if text else ""


def number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4g}"


def latency(values: Sequence[float], items: int = 1) -> Dict[str, float]:
    """Median, 20th and 80th percentile in ms, per item."""
    low, middle, high = np.percentile(values, [20, 50, 80]) / items
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def spread(values: Mapping[str, float]) -> str:
    if values["p20"] == values["p80"]:  # measured once
        return number(values["median"])
    return f"{values['median']:.4g} ({values['p20']:.4g}–{values['p80']:.4g})"


def plot(report: Mapping[str, Any], groups: Sequence[str], path: Path) -> None:
    """Latency per sample and the largest errors, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {label: row for label, row in report["executors"].items() if "failed" not in row}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(rows) + 2), layout="constrained")
    left.barh(list(rows), [row["ms_per_item"]["median"] for row in rows.values()], color="#4c72b0")
    left.bar_label(left.containers[0], fmt="%.4g", padding=3)
    left.set(title="Latency per sample", xlabel="ms")
    left.margins(x=0.25)
    left.invert_yaxis()
    compared = [label for label in rows if label != REFERENCE]
    height = 0.8 / len(groups)
    all_errors = []
    for index, group in enumerate(groups):
        positions = np.arange(len(compared)) + (index - (len(groups) - 1) / 2) * height
        # an error of zero has no place on a logarithmic axis
        errors = [max(rows[label]["errors"][group]["abs max"], 1e-9) for label in compared]
        right.barh(positions, errors, height, label=group)
        all_errors += errors
    if all_errors:  # whole decades: else the smallest error would have no bar
        decades = np.floor(np.log10([min(all_errors), max(all_errors)]))
        right.set_xlim(10.0 ** decades[0], 10.0 ** (decades[1] + 1))
        right.tick_params(axis="x", which="minor", labelbottom=False)
    right.set(title="Largest absolute error against PyTorch", xscale="log", yticks=range(len(compared)))
    right.set_yticklabels(compared)
    right.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(groups))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(report: Mapping[str, Any], folder: BuildFolder) -> None:
    """Prints the summary as a table, and without truths the outputs: `sample<TAB>executor<TAB>output`."""
    from rich.console import Console
    from rich.table import Table

    header, *rows = summary(report)
    shown = Table(title=f"{folder.spec.title}: {report['weights']}")
    for name in header:
        shown.add_column(name, justify="left" if name == "executor" else "right")
    colours = {"met": "green", "missed": "red", "failed": "red"}
    for *cells, verdict in rows:
        shown.add_row(*cells, f"[{colours.get(verdict, 'default')}]{verdict}[/]")
    console = Console()
    needed = console.measure(shown, options=console.options.update_width(sys.maxsize)).maximum
    console.width = max(console.width, needed)  # wrapped lines read better than cut cells
    console.print(shown)
    if not report["executors"][REFERENCE]["score"]:
        for sample in report["side_by_side"]:
            for label, value in sample["cells"].items():
                output = value if isinstance(value, str) else folder.path / value["picture"]
                print(f"{sample['name']}\t{label}\t{output}")


def write_report(folder: BuildFolder, report: Mapping[str, Any], groups: Sequence[str]) -> Path:
    """Writes report.json, .png and .md, and returns the latter's path.

    groups  the outputs whose errors the plot shows
    """
    with replacing(folder.path / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(folder.path / "report.png") as temporary:
        plot(report, groups, temporary)
    path = folder.path / "report.md"
    with replacing(path) as temporary:
        temporary.write_text(markdown(report, folder.spec.title), encoding="utf-8")
    return path
