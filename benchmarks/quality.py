"""What the draws of a run are worth."""

import warnings

import numpy as np


def by_dimension(x, function):
    """Apply a diagnostic of `(chains, draws)` to each coordinate; NaN where it is not defined."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.array([float(function(x[..., i])) for i in range(x.shape[-1])])


def mode_distance(x, modes):
    """Return the total variation distance of the occupied modes from equal shares."""
    points = x.reshape(-1, 1, x.shape[-1])
    nearest = np.concatenate(
        [((part - modes) ** 2).sum(-1).argmin(-1) for part in np.array_split(points, 64)]
    )
    shares = np.bincount(nearest, minlength=len(modes)) / nearest.size
    return 0.5 * float(np.abs(shares - 1.0 / len(modes)).sum())


def quality(x, target):
    """Return effective samples, R-hat and errors of draws `(chains, draws, dim)`."""
    import arviz

    x = np.asarray(x, dtype=np.float64)
    mean, sd = (part[: target.judged] for part in target.truth())
    flat = x.reshape(-1, x.shape[-1])[:, : target.judged]
    ratio = flat.std(0) / sd
    found = {
        "ess_bulk": by_dimension(x, lambda c: arviz.ess(c, method="bulk")).min(),
        "ess_tail": by_dimension(x, lambda c: arviz.ess(c, method="tail")).min(),
        "rhat": by_dimension(x, arviz.rhat).max(),
        "mean_error": np.abs((flat.mean(0) - mean) / sd).max(),
        "sd_ratio": ratio[np.abs(np.log(ratio)).argmax()],
    }
    if target.modes is not None:
        found["modes"] = mode_distance(x, target.modes)
    return {name: float(value) for name, value in found.items()}


def result(record, target):
    """Return all that is kept of one run."""
    sampling = record.seconds["sampling"]
    found = quality(record.x, target)
    return {
        **found,
        "bulk_per_s": found["ess_bulk"] / sampling,
        "tail_per_s": found["ess_tail"] / sampling,
        "bulk_per_1000": 1e3 * found["ess_bulk"] / record.gradients["sampling"],
        "seconds": record.seconds,
        "cpu_seconds": record.cpu_seconds,
        "gradients": record.gradients,
        "adapted": record.adapted,
        "note": record.note,
    }
