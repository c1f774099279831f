"""What two short texts, run through a network before it is tuned, tell of it.

Whether it reads from left to right and keeps the rows of a batch apart, which linear modules see
every token in its place, and which tensors nothing asks for. No architecture is named here.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedforward.core.errors import FedForwardError, out_of_memory
from fedforward.models.blocks import class_heads
from fedforward.models.loading import input_device, longest_sequence
from fedforward.models.offload import Offload

#: Tokens of a text, and of its beginning, which is run alone.
LENGTH, BEGINNING = 24, 13
#: Relative difference of two tensors beyond rounding, by dtype; others are narrower than float32.
APART = {torch.float32: 1e-3}
APART_IN_HALVES = 3e-2
#: What reads a tensor's form and none of its values.
_DESCRIBING = {"size", "dim", "numel", "stride", "ndimension", "is_contiguous", "element_size"}
_DESCRIBING |= {"is_floating_point", "is_complex", "untyped_storage", "data_ptr", "__get__"}


#: Why a linear module cannot be probed.
NOT_CALLED = "not called"
SOME_TOKENS = "given some of the tokens only"
NO_TENSOR = "more than a linear map"
SHARED = "with a weight that several modules share"


@dataclass(frozen=True)
class Trial:
    """What was seen.

    Attributes:
        linear: by name of a linear module, why it cannot be probed; "" if it can.
        unused: names of the parameters that nothing asks for, in modules that are never called.
        routed: names of those in modules that no token of the two texts was sent to.
    """

    linear: dict[str, str]
    unused: frozenset[str] = frozenset()
    routed: frozenset[str] = frozenset()


def trial_tokens(network: Any) -> torch.Tensor:
    """Two texts of ordinary tokens, int64 [2, at most LENGTH]."""
    count = int(network.get_input_embeddings().num_embeddings)
    count = min(count, int(getattr(network.config.get_text_config(), "vocab_size", count)))
    special = {value for name, value in _integers(network.config) if "token" in name}
    length = min(LENGTH, longest_sequence(network) or LENGTH)
    plain = [token for token in range(count // 16, count) if token not in special]
    plain = plain or list(range(count))
    step = max(1, len(plain) // (2 * length + 1))
    chosen = [plain[(place * step * 7) % len(plain)] for place in range(2 * length)]
    return torch.tensor(chosen).view(2, length)


def _integers(config: Any) -> Iterator[tuple[str, int]]:
    for name, value in vars(config).items():
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((name, part) for part in value if isinstance(part, int))
        elif hasattr(value, "model_type"):
            yield from _integers(value)


@contextmanager
def running(network: Any) -> Iterator[None]:
    """While it is open a network runs whose blocks wait in host memory."""
    device = input_device(network)
    hooked = any(hasattr(module, "_hf_hook") for module in network.modules())
    places = {p.device for p in network.parameters() if not p.is_meta}
    if hooked or places <= {device}:
        yield
        return
    offload = Offload(network, device)
    try:
        yield
    finally:
        offload.end()


@contextmanager
def sentences(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a network raises into a sentence.

    Args:
        what: goes wrong, before the reason.
        advice: what to do.

    Raises:
        FedForwardError: with the first of what the network says.
    """
    try:
        yield
    except FedForwardError:
        raise
    except Exception as error:
        # Networks raise whatever they like where they miss an input or a package.
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or "no reason"
        raise FedForwardError(f"{what} ({type(error).__name__}: {reason}). {advice}") from error


#: What may be wrong with a network that does not run.
ADVICE = "Look whether it takes texts alone, with this version of transformers and its config.json."


@torch.inference_mode()
def check_causal(network: Any, path: str) -> None:
    """Refuse a network whose loss of a text depends on what follows it, or on other rows.

    Args:
        path: as the user gave it.

    Raises:
        FedForwardError: it does.
    """
    if class_heads(network):
        return
    tokens = trial_tokens(network).to(input_device(network))
    begun = max(2, tokens.shape[1] * BEGINNING // LENGTH)
    kind = type(network).__name__
    failing = f"model.path = {path!r}: the network fails on two short texts"
    with sentences(failing, ADVICE), running(network):
        both = _logits(network, tokens)
        whole = _logits(network, tokens[:1])
        part = _logits(network, tokens[:1, :begun])
    if is_apart(part, whole[:, :begun], network.dtype):
        advice = "Give a causal language model."
        if getattr(network.config, "is_decoder", None) is False:
            advice += " If it was trained as a decoder, set is_decoder to true in its config.json."
        raise FedForwardError(
            f"model.path = {path!r} is not causal: in this {kind} what follows a text changes the "
            f"loss of that text, padding included. {advice}"
        )
    if is_apart(both[:1], whole, network.dtype):
        raise FedForwardError(
            f"model.path = {path!r}: in this {kind} the loss of a text changes with the other rows "
            "of its batch, so that a probe has no loss of its own. Give another model."
        )


def _logits(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = network(input_ids=tokens, use_cache=False).logits
    return logits.float() - logits.float().mean(dim=-1, keepdim=True)


def is_apart(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether half of the positions, [..., features], differ by more than rounding.

    Args:
        dtype: in which the network computes.
    """
    other = other.to(one.device)
    if one.shape != other.shape:
        return True
    apart = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)
    return bool(apart.median() > APART.get(dtype, APART_IN_HALVES))


class _Record(TorchFunctionMode):
    """Notes the `id` of every parameter whose values some function is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name not in _DESCRIBING or (name == "__get__" and isinstance(result, torch.Tensor)):
            leaves = tree_leaves((args, kwargs))
            self.seen.update(id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter))
        return result


class _Calls:
    """What modules are called with while it is open.

    Attributes:
        called: `id` of every module that was called.
        given: of linear modules, by name, a number for each token of each call.
        plain: of those, whether all results were tensors of the module's width.
    """

    def __init__(self, network: nn.Module) -> None:
        self.called: set[int] = set()
        self.given: dict[str, list[torch.Tensor]] = {}
        self.plain: dict[str, bool] = {}
        self._network = network

    def __enter__(self) -> "_Calls":
        self._handles = []
        for name, module in self._network.named_modules():
            note = self._note if not is_linear(module) else self._linear(name)
            self._handles.append(module.register_forward_hook(note, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, *_: Any) -> None:
        self.called.add(id(module))

    def _linear(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self.called.add(id(module))
            tensors = [leaf for leaf in (*args, *kwargs.values()) if torch.is_tensor(leaf)]
            good = torch.is_tensor(result) and len(tensors) == 1
            good = good and result.shape[:-1] == tensors[0].shape[:-1]
            # A grouped linear map has fewer inputs and outputs than its weight says.
            good = good and (tensors[0].shape[-1], result.shape[-1]) == _features(module)
            self.plain[name] = self.plain.get(name, True) and good
            if good:
                x = tensors[0].float()
                # One number tells tokens apart; a norm would be the same for all after a norm.
                signs = torch.arange(1, x.shape[-1] + 1, device=x.device).float().cos()
                self.given.setdefault(name, []).append((x @ signs).cpu())

        return note


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can stand beside this module."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


@torch.inference_mode()
def examine(network: Any) -> Trial:
    """Run two texts together and each alone, and see what is called with what.

    A sequence classifier is not run: all its linear modules count as those that can be probed.

    Raises:
        FedForwardError: the network cannot be run.
    """
    linear = [name for name, module in network.named_modules() if is_linear(module)]
    if class_heads(network):
        return Trial(dict.fromkeys(linear, ""))
    tokens = trial_tokens(network).to(input_device(network))
    with sentences("This network fails on two short texts", ADVICE), running(network):
        with _Record() as record, _Calls(network) as both:
            network(input_ids=tokens, use_cache=False)
        alone = []
        for row in tokens:
            with _Calls(network) as calls:
                network(input_ids=row[None], use_cache=False)
            alone.append(calls)
    reasons = {name: _why_not(name, tokens.shape[1], both, alone, network.dtype) for name in linear}
    modules = dict(network.named_modules())
    for name in shared_weights(network):
        reasons[name] = reasons.get(name) or SHARED
    unused: set[str] = set()
    routed: set[str] = set()
    for name, parameter in network.named_parameters():
        owner = name.rpartition(".")[0]
        if id(parameter) in record.seen or id(modules[owner]) in both.called:
            continue
        (routed if _is_routed(owner, modules, both.called) else unused).add(name)
        if owner in reasons and name in routed:
            reasons[owner] = SOME_TOKENS
    return Trial(reasons, frozenset(unused), frozenset(routed))


def shared_weights(network: nn.Module) -> list[str]:
    """Names of the linear modules whose weight is that of another module as well.

    Adapters of their own could not be merged into it.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    return [
        name
        for name, module in network.named_modules()
        if is_linear(module) and len(users[id(module.weight)]) > 1
    ]


def _why_not(name: str, length: int, both: _Calls, alone: list[_Calls], dtype: torch.dtype) -> str:
    """Why a linear module cannot be probed; "" if it can (see `Trial.linear`)."""
    if name not in both.plain:
        return NOT_CALLED
    if not both.plain[name]:
        return NO_TENSOR
    together, singles = both.given[name], [calls.given.get(name, []) for calls in alone]
    if any(len(calls) != len(together) for calls in singles):
        return SOME_TOKENS
    for call, joined in enumerate(together):
        if joined.numel() % 2 or len(joined) not in ((2,) if joined.dim() > 1 else (2 * length,)):
            return SOME_TOKENS
        halves = joined.reshape(2, -1)
        own = [single[call].reshape(-1) for single in singles]
        if any(half.shape != part.shape for half, part in zip(halves, own, strict=True)):
            return SOME_TOKENS
        parts = torch.stack(own)
        if is_apart(halves[..., None], parts[..., None], dtype):
            return SOME_TOKENS
    return ""


def _is_routed(owner: str, modules: dict[str, nn.Module], called: Collection[int]) -> bool:
    """Whether a module that was not called is in one of several, of which others were."""
    while owner:
        parent = owner.rpartition(".")[0]
        above = modules[parent]
        if isinstance(above, (nn.ModuleList, nn.ModuleDict)):
            kind = type(modules[owner])
            beside = (m for m in above.children() if type(m) is kind and m is not modules[owner])
            if any(id(module) in called for module in beside):
                return True
        elif id(above) in called:
            return False
        owner = parent
    return False


def patterns(names: Collection[str], most: int = 4) -> str:
    """Names with numbers replaced by *, each once, and only the first of them."""
    found = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if found[most:] else "")
