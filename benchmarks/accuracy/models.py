"""Small LLaVA models to train: their shape, their start, and the heads that only training needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from consensusdrop_kernels.data import tiny_llava_path
from consensusdrop_kernels.scenes import IMAGE_SIZE

from .data import PACK, SEGMENT

HEAD_DIM = 32
#: Of the dense heads, in this order: classes of shape, color, digit and size, center, occupancy.
_DENSE = {"shape": 8, "color": 8, "digit": 9, "size": 3, "center": 2, "occupied": 1}
_TIED = 3  # layers whose keys start as their queries: patches first look at patches like them


@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Args:
        tower: "clip" (with a class token) or "siglip" (patches only).
        patch: pixels across a patch; divides 112.
        layers, width: of the vision tower; the last layer serves the contrastive loss only.
        text_layers, text_width: of the LLM.

    Raises:
        ValueError: a value is not one of these.
    """

    tower: str = "clip"
    patch: int = 8
    layers: int = 5
    width: int = 128
    text_layers: int = 4
    text_width: int = 192

    def __post_init__(self) -> None:
        if self.tower not in ("clip", "siglip"):
            raise ValueError(f"tower must be 'clip' or 'siglip', got {self.tower!r}")
        if self.patch < 1 or IMAGE_SIZE % self.patch:
            raise ValueError(f"patch must divide {IMAGE_SIZE}, got {self.patch}")
        for name in ("width", "text_width"):
            if getattr(self, name) < 1 or getattr(self, name) % HEAD_DIM:
                raise ValueError(
                    f"{name} must be a multiple of {HEAD_DIM}, got {getattr(self, name)}"
                )
        if self.layers < 2 or self.text_layers < 1:
            raise ValueError(
                "layers must be at least 2 and text_layers at least 1, "
                f"got {self.layers} and {self.text_layers}"
            )

    @property
    def grid(self) -> int:
        """Patches each way."""
        return IMAGE_SIZE // self.patch


def processor(shape: Shape) -> Any:
    """The processor of the model that ships with the package, told this model's patches."""
    made = AutoProcessor.from_pretrained(tiny_llava_path())
    made.patch_size = shape.patch
    made.num_additional_image_tokens = int(shape.tower == "clip")
    made.vision_feature_select_strategy = "default" if shape.tower == "clip" else "full"
    return made


def build(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """A LLaVA of this shape at its start, which follows from the seed."""
    tokenizer = processor(shape).tokenizer
    sizes: dict[str, Any] = {
        "hidden_size": shape.width, "intermediate_size": 4 * shape.width,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.width // HEAD_DIM,
        "image_size": IMAGE_SIZE, "patch_size": shape.patch,
    }  # fmt: skip
    clip = shape.tower == "clip"
    vision = CLIPVisionConfig(**sizes, projection_dim=shape.width) if clip else None
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=shape.text_width,
        intermediate_size=round(shape.text_width * 8 / 3 / 16) * 16,
        num_hidden_layers=shape.text_layers, num_attention_heads=shape.text_width // HEAD_DIM,
        num_key_value_heads=shape.text_width // HEAD_DIM, head_dim=HEAD_DIM,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision or SiglipVisionConfig(**sizes, vision_use_head=False),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=shape.grid**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    _start(model, shape)
    return model


@torch.no_grad()
def _start(model: LlavaForConditionalGeneration, shape: Shape) -> None:
    """Weights of variance 1 / fan-in, far larger than the stock start at this depth, with which
    training stalls; half of that where a layer writes; patch positions from 2-D sines."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            writes = name.endswith(("out_proj", "fc2", "o_proj", "down_proj"))
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, (0.5 if writes else 1.0) * fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.model.language_model.embed_tokens.weight.normal_(0.0, 1.0)
    tower = model.model.vision_tower
    positions = tower.embeddings.position_embedding.weight
    positions[-(shape.grid**2) :] = 0.7 * sines(shape.grid, shape.width)
    for layer in tower.encoder.layers[:_TIED]:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def sines(grid: int, width: int) -> Tensor:
    """A position table, ``[grid * grid, width]``: waves along x and along y, 4 patches to 4 grids
    long."""
    length = 4.0 * grid ** torch.linspace(0, 1, width // 4)
    phase = 2 * np.pi * torch.arange(grid)[:, None] / length  # [grid, width / 4]
    wave = torch.cat([phase.sin(), phase.cos()], 1)
    half = width // 2
    y, x = (t.expand(grid, grid, half) for t in (wave[:, None], wave[None]))
    return torch.cat([x, y], 2).reshape(grid * grid, width)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention from matrix products: at these sizes its gradient takes a CPU less than half the
    time of torch's fused one."""
    scores = (query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("accuracy_plain", plain_attention)


class TowerHeads(nn.Module):
    """What stage 1 needs beside the tower: a caption encoder and dense heads on three layers."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.patches = shape.grid**2
        self.class_token = shape.tower == "clip"
        width = shape.width
        #: The layer that LLaVA reads, and one before it where there is one.
        self.layers = sorted({min(3, shape.layers - 1), shape.layers - 1})
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.places = nn.Parameter(0.3 * torch.randn(64, width))
        self.caption = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // HEAD_DIM, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.from_image = nn.Linear(width, width, bias=False)
        self.from_text = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(10.0).log())
        self.dense = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_DENSE.values())))
            for _ in self.layers
        )
        self.early = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and figures of it: each a scalar."""
        figures = {}
        figures["contrast"], figures["retrieved"] = self.contrast(output, batch["caption"])
        occupied = (batch["weight"] > 0).float()
        first = self.early(output.hidden_states[1][:, -self.patches :])[..., 0]
        loss = figures["contrast"] + 0.3 * F.binary_cross_entropy_with_logits(
            first.float(), occupied
        )
        for layer, head in zip(self.layers, self.dense, strict=True):
            said = head(output.hidden_states[layer][:, -self.patches :]).float()
            dense, right = _dense_loss(said, occupied, batch)
            loss = loss + dense
        figures |= {"dense": dense} | right
        return loss, figures

    def contrast(self, output: Any, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Symmetric cross entropy of images and captions, and the share of images retrieved."""
        pooled = output.pooler_output if self.class_token else output.last_hidden_state.mean(1)
        text, hidden = self.words(caption) + self.places[: caption.shape[1]], caption == 0
        for layer in self.caption:
            text = layer(text, src_key_padding_mask=hidden)
        seen = (~hidden).unsqueeze(2)
        text = (self.norm(text) * seen).sum(1) / seen.sum(1)
        image = F.normalize(self.from_image(pooled).float(), dim=1)
        text = F.normalize(self.from_text(text).float(), dim=1)
        logits = self.scale.exp().clamp(max=100) * image @ text.T
        goal = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)) / 2
        return loss, (logits.argmax(0) == goal).float().mean()


def _dense_loss(
    said: Tensor, occupied: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of `said` [B, N, 31], and the weighted share of patches right in each field."""
    parts = dict(zip(_DENSE, said.split(list(_DENSE.values()), 2), strict=True))
    weight = batch["weight"]
    total = weight.sum()
    loss = F.binary_cross_entropy_with_logits(parts["occupied"][..., 0], occupied)
    off = (parts["center"] - batch["center"]).square().sum(2)
    loss = loss + 10 * (off * weight).sum() / total
    right = {"center": ((off * weight).sum() / total).sqrt()}
    for field in ("shape", "color", "digit", "size"):
        each = F.cross_entropy(parts[field].transpose(1, 2), batch[field], reduction="none")
        loss = loss + (each * weight).sum() / total
        hit = (parts[field].argmax(2) == batch[field]).float()
        right[field] = (hit * weight).sum() / total
    return loss, right


class Packed(nn.Module):
    """A LLaVA asked `PACK` questions behind one image, which don't see one another.

    A question's tokens see the image, their own question up to themselves, and stand at the
    positions they would have behind the image alone: what they compute is what they would compute
    there. `locate` serves training only: it says where the objects are that a relation names.
    """

    def __init__(self, model: LlavaForConditionalGeneration, shape: Shape) -> None:
        super().__init__()
        self.model = model
        words = model.config.text_config
        vocabulary = processor(shape).tokenizer.get_vocab()
        before = torch.tensor([vocabulary["<bos>"], vocabulary["USER:"]])
        prefix = len(before) + shape.grid**2
        segment = torch.cat(
            [torch.full((prefix,), -1), torch.arange(PACK).repeat_interleave(SEGMENT)]
        )
        same = (segment[:, None] == segment) | (segment == -1)
        places = torch.cat([torch.arange(prefix), prefix + torch.arange(SEGMENT).repeat(PACK)])
        self.register_buffer("before", before, persistent=False)
        self.register_buffer("mask", same.tril()[None, None], persistent=False)
        self.register_buffer("places", places[None], persistent=False)
        self.locate = nn.Linear(words.hidden_size, 2)
        self.halfway = (words.num_hidden_layers + 1) // 2

    def forward(
        self, pixels: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of the answer and of what follows it, [B, PACK, V] each; in training also where
        the named objects are, [B, PACK, 2, 2]."""
        llava = self.model.model
        rows = len(pixels)
        image = torch.stack(tuple(llava.get_image_features(pixels).pooler_output))
        embed = llava.language_model.embed_tokens
        before = embed(self.before).expand(rows, -1, -1)
        words = embed(batch["words"].flatten(1))
        middle: list[Tensor] = []
        layer = llava.language_model.layers[self.halfway - 1]
        handle = layer.register_forward_hook(lambda _m, _i, out: middle.append(out))
        try:
            hidden = llava.language_model(
                inputs_embeds=torch.cat([before, image.to(words.dtype), words], 1),
                attention_mask=self.mask.expand(rows, 1, -1, -1),
                position_ids=self.places.expand(rows, -1),
                use_cache=False,
            ).last_hidden_state
        finally:
            handle.remove()
        answer, after = (self._at(hidden, batch["turn"] + i) for i in (0, 1))
        located = None
        if self.training:
            named = [self._at(middle[0], batch["named"][..., i]) for i in (0, 1)]
            located = self.locate(torch.stack(named, 2))
        head = self.model.lm_head
        return head(answer), head(after), located

    def _at(self, hidden: Tensor, turn: Tensor) -> Tensor:
        """Hidden states [B, PACK, D] at one token of each question."""
        words = hidden[:, -PACK * SEGMENT :].unflatten(1, (PACK, SEGMENT))
        index = turn[..., None, None].expand(-1, -1, 1, words.shape[-1])
        return words.gather(2, index)[:, :, 0]
