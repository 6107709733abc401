"""Which patches go into which token: by gradients through a model, and by an adapter's map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.hf.tap import Tapped


def sources(call: Callable[[], Any], leaf: Tensor) -> Tensor:
    """`[tokens, patches]` bool: the patches, rows of `leaf`, that each token of the features that
    `call` returns depends on."""
    features = call().pooler_output
    tokens = torch.cat([part.flatten(0, -2) for part in features])
    weight = torch.randn(tokens.shape[1], generator=torch.Generator().manual_seed(3))
    rows = [
        torch.autograd.grad((token * weight).sum(), leaf, retain_graph=True)[0] for token in tokens
    ]
    return torch.stack([row.abs().sum(-1).flatten() > 0 for row in rows])


def mapped(model: Any, output: Any, arguments: dict[str, Any], shape: tuple[int, ...],
           prefix: int = 0) -> Tensor:  # fmt: skip
    """`[tokens, patches]`: the share of each patch in each token, as the model's adapter says.

    The metric of a patch is the mean of its keys; here the key of patch `i` is 1 at `i`. `shape` is
    that of the encoder's sequences: how many, and how many patches each.
    """
    count, patches = shape
    total = count * patches
    keys = torch.eye(total).view(count, 1, patches, total)
    keys = torch.nn.functional.pad(keys, (0, 0, prefix, 0))
    encode = find(model.config).sources[0].encode
    encoded = encode(model, [Tapped(torch.zeros_like(keys), keys, 1.0)], output, arguments)
    return torch.cat(encoded.metric)


def check_map(
    model: Any, arguments: dict[str, Any], shape: tuple[int, ...], width: int,
    stand_in: Callable[[Tensor], Any], share: float, prefix: int = 0,
) -> None:  # fmt: skip
    """The map must name exactly the patches that each token depends on, each with an equal share.

    `stand_in` puts encoder features `[sequences, patches, width]` into the model in place of its
    own, and returns a hook to remove.
    """
    outer = model.get_submodule(find(model.config).outer)
    leaf = torch.randn(shape[0], prefix + shape[1], width, requires_grad=True)
    hook = stand_in(leaf)
    try:
        features: list[Any] = []

        def call() -> Any:
            features.append(outer.get_image_features(**arguments, return_dict=True))
            return features[-1]

        want = sources(call, leaf)
    finally:
        hook.remove()
    want = want.view(len(want), shape[0], -1)[:, :, prefix:].flatten(1)
    got = mapped(model, features[0], arguments, shape, prefix)
    assert torch.equal(got > 0, want)
    torch.testing.assert_close(got, want * share, atol=1e-6, rtol=0)


def last_hidden_state(tower: Any) -> Callable[[Tensor], Any]:
    """Puts features in place of a tower's last hidden state."""

    def stand_in(leaf: Tensor) -> Any:
        def replace(module: Any, args: Any, output: Any) -> Any:
            output.last_hidden_state = leaf
            return output

        return tower.register_forward_hook(replace)

    return stand_in


def received(maps: Tensor, rows: Tensor | None = None) -> Tensor:
    """What each key receives on average over heads and rows, `[R, N]`, of maps `[R, H, N, N]`;
    `rows [R, N]` bool leaves rows out."""
    if rows is None:
        return maps.mean((1, 2))
    share = rows / rows.sum(1, keepdim=True)
    return (maps.mean(1) * share[:, :, None]).sum(1)
