"""Why a mark is missed, found where it was measured: by a profile, or from what the stages noted of themselves."""

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Run

PRODUCT = re.compile(r"aten::(add|badd)?b?mm_?|aten::_scaled_dot_product_\w+|aten::_(flash|efficient)_attention_\w+")
MOST = 4  # operations that are named


def by_profile(ours: Run, theirs: Run, of_what: str) -> str:
    """Where the seconds of two runs go: both are run once more, under torch's profiler, which slows what is small.

    Args:
        ours: ours.
        theirs: what it is measured against.
        of_what: what these two runs work on.

    Returns:
        Half a sentence: matrix products (attention's, too) and all else, here and there.
    """
    here, there = _seconds_of_operations(ours), _seconds_of_operations(theirs)
    products, rest, other_products, other_rest = (
        {name: s for name, s in found.items() if _is_product(name) is is_product}
        for found in (here, there)
        for is_product in (True, False)
    )
    most = ", ".join(f"{name.removeprefix('aten::')} {s:.2g}" for name, s in Counter(rest).most_common(MOST))
    return (
        f"by profile of {of_what}, in seconds: matrix products {_sums(products, other_products)}; "
        f"all else {_sums(rest, other_rest)}, most of it here {most}"
    )


def by_stage(ours: Mapping[str, float], theirs: Mapping[str, float], unit: str = "seconds") -> str:
    """Which stages take longer, from the seconds that their manifests say.

    Args:
        ours: seconds by stage.
        theirs: the same of what it is measured against.
        unit: of what is given, where it is made of those seconds.

    Returns:
        Half a sentence.
    """
    more = Counter({stage: ours[stage] - theirs.get(stage, 0.0) for stage in ours}).most_common(MOST)
    named = ", ".join(f"{stage} {_beside(ours[stage], theirs.get(stage, 0.0))}" for stage, _ in more)
    return f"within the stages, by their manifests, in {unit}: {_sums(ours, theirs)}; those that differ most: {named}"


def _sums(ours: Mapping[str, float], theirs: Mapping[str, float]) -> str:
    return _beside(sum(ours.values()), sum(theirs.values()))


def _beside(here: float, there: float) -> str:
    return f"{here:.3g} here and {there:.3g} there" + (f" ({here / there:.3g} times)" if there > 0 else "")


def _is_product(name: str) -> bool:
    return PRODUCT.fullmatch(name) is not None


def _seconds_of_operations(run: Run) -> dict[str, float]:
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        run()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = (event for event in found.key_averages() if event.device_type == DeviceType.CPU)  # no kernels: twice
    return {event.key: getattr(event, attribute) / 1e6 for event in operations}
