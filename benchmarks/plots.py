"""How measurements are drawn."""

NAMES = {"ours": "ours", "cudnn": "cuDNN", "fa2": "FlashAttention-2 (torch's)", "flex": "FlexAttention", "fa3": "FlashAttention-3"}
NAMES |= {"efficient": "memory-efficient", "transformers": "transformers"}


def pyplot():
    """Matplotlib for files, on machines without a screen. Imported here, because all but the plots does without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def lines(axis, series, xlabel, ylabel):
    """{label: [(x, y), ...]} on logarithmic axes. One without points keeps its colour, but is not in the legend."""
    for label, points in series.items():
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label if points else None)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    xs = sorted({x for points in series.values() for x, _ in points})
    axis.set_xticks(xs, xs)
    axis.set_xticks([], minor=True)


def bars(axis, values, ylabel):
    axis.bar(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    axis.set_ylabel(ylabel)
    if len(values) * max(map(len, values)) > 40:  # the names would run into each other
        axis.set_xticks(range(len(values)), values, rotation=20, ha="right")
