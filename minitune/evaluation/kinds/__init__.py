"""What `python -m minitune.evaluate` can measure: a module for each kind, named as its option, with four functions.

    read(config)                               -> task     the data, checked before any model is loaded
    measure(model, tokenizer, task, config)    -> found    of one model, kept when the model is gone
    report(task, found, base, config)          -> object   for JSON; `base` is None, or the base's `found`
    lines(object)                              -> lines    for a reader

`KEY` is the object's name in the result. A kind that has `measure_base` too measures the base by that. `config` is the
door's EvaluateConfig, of which a kind reads its own options; the door says which those are, and for which kinds the
base is measured too. A class with four methods was rejected: it would hold nothing but the option's name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitune.errors import ConfigError


def named(option: str, text: str) -> list[str]:
    """Return the names between the commas of an option; raises ConfigError where there is none."""
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ConfigError(f"{option} is {text!r}; give names between commas, as wiki-demo,c4-demo")
    return names


@contextmanager
def progress(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves a progress bar by a number of `unit`s, of `total`."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=f" {unit}") as bar:
        yield bar.update
