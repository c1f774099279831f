"""Which modules LoRA adapts: what can be probed, and what PEFT adapts, loads again and merges."""

import logging
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.models.blocks import names_in_blocks
from fedforward.models.lora_layers import ADAPTER
from fedforward.models.text_part import text_prefixes
from fedforward.models.trial import NO_TENSOR, NOT_CALLED, Trial, is_linear, patterns

LOGGER = logging.getLogger("fedforward.models")


def find_targets(
    network: Any,
    targets: str | Sequence[str],
    blocks: Collection[int] | None,
    heads: Sequence[str],
    trial: Trial,
    only: Collection[str] | None = None,
) -> tuple[list[str], str]:
    """Names of the modules to adapt, as PEFT takes them, and what is left out, in words.

    Nothing in a sequence classifier's heads is adapted. "all-linear" takes what can be probed, the
    output layer aside.

    Args:
        heads: of a sequence classifier.
        only: names of modules; others are as if they were not there. None is all.

    Raises:
        FedForwardError: a module that `targets` names cannot be adapted.
    """
    every = targets == "all-linear"
    # A name such as q_proj stands for the text part's modules, though a tower has such ones, too.
    # What a text calls is not known of a sequence classifier.
    inside = ("",) if every and not heads else text_prefixes(network)
    if blocks is not None:
        inside = tuple(names_in_blocks(network, blocks))
    outside = tuple(f"{name}." for name in heads)

    def is_target(name: str) -> bool:
        if isinstance(targets, str):
            return every or re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    last = network.get_output_embeddings()
    modules = {
        name: module
        for name, module in network.named_modules()
        if name.startswith(inside)
        and not f"{name}.".startswith(outside)
        and is_target(name)
        and (only is None or name in only)
        and not (every and module is last)
    }
    if not every:
        named = [name for name, module in modules.items() if is_leaf_of_weights(module)]
        adapted = taken_by_peft(network, [name for name in named if is_linear(modules[name])])
        for name in named:
            _check_target(targets, name, modules[name], trial, name in adapted)
        return _shortened(network, named), ""
    reasons = {name: trial.linear[name] for name, m in modules.items() if is_linear(m)}
    good = [name for name, reason in reasons.items() if not reason]
    for name in set(good) - taken_by_peft(network, good):
        reasons[name] = "not adapted or not loaded by PEFT in this architecture"
    others = [name for name, module in modules.items() if _holds_matrices(module, name, trial)]
    reasons |= dict.fromkeys(others, "no linear module")
    taken = [name for name, reason in reasons.items() if not reason]
    words = [
        f"{patterns([name for name, own in reasons.items() if own == reason])} ({reason})"
        for reason in dict.fromkeys(reasons.values())
        if reason
    ]
    return _shortened(network, taken), "; ".join(words)


def check_writers(
    network: Any,
    targets: str | Sequence[str],
    found: Sequence[str],
    writers: Collection[str],
    left_out: str,
) -> None:
    """Refuse targets of `lora.factors = "R"` that do not write into the residual stream.

    Args:
        found: what is adapted.
        writers: names of the modules that write into it.
        left_out: of them, in words.

    Raises:
        FedForwardError: nothing is found, or a name in `targets` stands for none of them.
    """
    last = ", ".join(sorted({name.rpartition(".")[2] for name in writers})) or "none"
    others = [] if isinstance(targets, str) else [t for t in targets if not _ends(writers, t)]
    if others and any(_ends([name for name, _ in network.named_modules()], t) for t in others):
        raise FedForwardError(
            f"lora.targets names {others[0]!r}, which does not write into the residual stream, as "
            f"modules with lora.factors = 'R' must; here these are {last}. Leave it out, or use "
            "lora.factors = 'B'."
        )
    if not found:
        why = f" It leaves out {left_out}." if left_out else ""
        raise FedForwardError(
            f"lora.factors = 'R' leaves nothing to adapt: it takes modules that write into the "
            f"residual stream, here {last}, of those that lora.targets = {targets!r} and "
            f"model.blocks name.{why} Use lora.factors = 'B'."
        )
    LOGGER.info("lora.factors = 'R' adapts what writes into the residual stream: %s", last)


def _ends(names: Collection[str], part: str) -> bool:
    """Whether one of some names is `part`, or ends with it."""
    return any(f".{name}".endswith(f".{part}") for name in names)


def _shortened(network: nn.Module, names: Sequence[str]) -> list[str]:
    """The last parts of some modules' names, where no other module ends in one; else the names."""
    last = sorted({name.rpartition(".")[2] for name in names})
    ends = tuple(f".{part}" for part in last)
    found = [name for name, _ in network.named_modules() if f".{name}".endswith(ends)]
    return last if sorted(found) == sorted(names) else list(names)


def is_leaf_of_weights(module: nn.Module) -> bool:
    """Whether a module is one that PEFT would be given: it has parameters of its own."""
    return any(True for _ in module.parameters(recurse=False))


def _holds_matrices(module: nn.Module, name: str, trial: Trial) -> bool:
    """Whether a module multiplies by weights of its own, as routers and fused experts do."""
    if isinstance(module, nn.Embedding) or any(map(is_linear, module.modules())):
        return False
    own = module.named_parameters(recurse=False)
    return any(p.dim() > 1 and f"{name}.{key}" not in trial.unused for key, p in own)


def taken_by_peft(network: Any, names: Sequence[str]) -> set[str]:
    """Those of some linear modules that PEFT adapts, and whose adapters it loads again.

    It refuses some of Mamba's modules, and takes names that experts had before they were fused for
    the fused ones. When it loads an adapter, it renames tensors as transformers does with those of
    old checkpoints; a module that is renamed so would be loaded without its adapter.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTuner

    check = getattr(BaseTuner, "_check_target_module_compatiblity", None)
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        conversion = None
    taken = set()
    for name in names:
        settings = LoraConfig(target_modules=[name])
        try:
            if check is not None:
                check(None, settings, network, name.rpartition(".")[2])
            if conversion is not None:
                conversion.convert_peft_config_for_transformers(settings, network, None)
        except ValueError:
            continue
        if name in settings.target_modules:
            taken.add(name)
    if conversion is None:
        return taken
    # One factor with a number of its own stands for each module.
    saved = {
        f"base_model.model.{name}.lora_{part}.weight": torch.full((1, 1), float(number))
        for number, name in enumerate(sorted(taken))
        for part in "AB"
    }
    settings = LoraConfig(r=1, target_modules=sorted(taken))
    convert = conversion.convert_peft_adapter_state_dict_for_transformers
    loaded = convert(network, settings, dict(saved), adapter_name=ADAPTER)
    lost = [k for k, one in saved.items() if k not in loaded or not torch.equal(loaded[k], one)]
    return {name for name in taken if not any(f".{name}.lora_" in key for key in lost)}


def _check_target(
    targets: str | Sequence[str], name: str, module: nn.Module, trial: Trial, taken: bool
) -> None:
    """Refuse what a user has named and no adapter can stand beside."""
    taken_in = f"lora.targets = {targets!r} takes in {name}, "
    kind = type(module).__name__
    if not is_linear(module):
        raise FedForwardError(
            f"{taken_in}a {kind}, and only linear modules can be probed. Name the modules to "
            "adapt, as in ['q_proj', 'v_proj']."
        )
    reason = trial.linear[name]
    if reason in (NO_TENSOR, NOT_CALLED):
        raise FedForwardError(
            f"{taken_in}a {kind} that is {reason} in this model, so that an adapter would not be "
            "seen. Leave it out, or use 'all-linear'."
        )
    if not taken:
        raise FedForwardError(
            f"{taken_in}which PEFT does not adapt or load again in this kind of model: its name "
            "stands for another, or a kernel reads its weight past it. Leave it out, or use "
            "'all-linear'."
        )
