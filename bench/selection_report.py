"""The table and the plot of the selection study, made from its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN = "<!-- selection: written by `python -m tokfuse.bench.study_selection` -->"
END = "<!-- /selection -->"
RANKINGS = 8  # number of training sets per seed
KINDS = ("useful", "irrelevant", "mislabelled")
RANDOM = "random"


def by_ranking(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each ranking, sorted by the mean gain over the seeds, best first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["ranking"], []).append(row)
    return dict(sorted(groups.items(), key=lambda item: mean(item[1], "before") - mean(item[1], "after")))


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def with_error(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Return the mean with its standard error as text. One value has no error."""
    middle = sum(values) / len(values)
    if len(values) == 1:
        return f"{middle:{sign}.{digits}f}"
    variance = sum((x - middle) ** 2 for x in values) / (len(values) - 1)
    return f"{middle:{sign}.{digits}f} +- {(variance / len(values)) ** 0.5:.{digits}f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per ranking: its choice, and its accuracy with standard errors over the seeds that ran."""
    at_random = {row["seed"]: row["after"] for row in rows if row["ranking"] == RANDOM}
    lines = [
        "| trained on | " + " | ".join(KINDS) + " | accuracy | above random | log-prob of the answer |",
        "| --- " * 7 + "|",
    ]
    for name, group in by_ranking(rows).items():
        above = [row["after"] - at_random[row["seed"]] for row in group if row["seed"] in at_random]
        cells = [name, *(f"{mean(group, kind):.0%}" for kind in KINDS), with_error([row["after"] for row in group])]
        cells.append("-" if name == RANDOM or not above else with_error(above, sign="+"))
        cells.append(with_error([row["logp"] for row in group]))
        lines.append("| " + " | ".join(cells) + " |")
    start = {row["seed"]: row["before"] for row in rows}
    lines.append(f"| nothing | - | - | - | {with_error(list(start.values()))} | - | - |")
    return "\n".join(lines)


def facts(rows: Sequence[dict[str, Any]]) -> str:
    """Return the machine and the settings as text."""
    last = rows[-1]
    seconds = sum(row["seconds"] for row in rows)
    settings = ", ".join(f"{key} {value:g}" for key, value in last["settings"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return (
        f"Seeds {len({row['seed'] for row in rows})}. {last['cpu_model']}, threads {last['threads']}, torch "
        f"{last['torch']}, commits {commits}; {seconds / 60:.0f} minutes of training on a shared machine. {settings}."
    )


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the text between the two marks of the page."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"study_selection: {path} must hold {BEGIN!r} and {END!r} once each. Add the missing mark.")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n{table(rows)}\n\n{facts(rows)}\n{END}{tail}")


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Plot one bar per ranking with one point per seed, and below it the shares of its choice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = by_ranking(rows)
    names, place = [*groups], range(len(groups))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    top.bar(place, [mean(group, "after") for group in groups.values()], color="0.8")
    for i, group in enumerate(groups.values()):
        top.plot([i] * len(group), [row["after"] for row in group], "k.")
    top.axhline(mean(rows, "before"), color="tab:red", linestyle="--", label="before training")
    top.set_ylabel("held-out accuracy")
    top.legend()
    base = [0.0] * len(names)
    for kind, color in zip(KINDS, ("tab:green", "tab:gray", "tab:red"), strict=True):
        share = [mean(group, kind) for group in groups.values()]
        bottom.bar(place, share, bottom=base, color=color, label=kind)
        base = [a + b for a, b in zip(base, share, strict=True)]
    bottom.set_ylabel("share of the chosen samples")
    bottom.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    bottom.set_xticks(place, names, rotation=30, ha="right")
    figure.savefig(path, dpi=110)
    plt.close(figure)
