"""How measurements are drawn."""

NAMES = {"ours": "ours", "cudnn": "cuDNN", "fa2": "FlashAttention-2", "flex": "FlexAttention", "fa3": "FlashAttention-3"}
NAMES |= {"efficient": "memory-efficient", "transformers": "transformers"}


def pyplot():
    """Matplotlib for files, on machines without a screen. Imported here, because all but the plots does without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def lines(axis, series, xlabel, ylabel):
    """{label: [(x, y), ...]} on logarithmic axes."""
    for label, points in series.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=label)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    xs = sorted({x for points in series.values() for x, _ in points})
    axis.set_xticks(xs, xs)
    axis.set_xticks([], minor=True)


def bars(axis, values, ylabel):
    axis.bar(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    axis.set_ylabel(ylabel)
