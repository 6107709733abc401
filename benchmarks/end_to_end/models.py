"""Models at full size with random weights, the trained small one, or any other by its id.

Random weights are drawn on the device itself, so that a model of 7 billion parameters is there in
seconds and needs no download. How long a prefill takes does not depend on what the weights are;
what it answers does, so answers of these models mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.initialization import no_init_weights

from consensusdrop_kernels.demo import Assistant, DemoError
from consensusdrop_kernels.hf.adapter import find
from consensusdrop_kernels.scenes import QUESTION_TYPES, sample_questions

#: Words of a prompt before the image and after it, as in the template of LLaVA-1.5 with a question
#: of a dozen words.
BEFORE, AFTER = 35, 24
#: Pixels along each side of the picture that other models than the shipped one are shown.
PICTURE = 672
_SHIPPED_QUESTION = "how many objects are there ?"
_QUESTION = "How many objects are there in this picture, and which of them is the largest one?"
#: Places of a prompt, padded at the left where prompts differ in length.
_PADDED = ("input_ids", "attention_mask", "mm_token_type_ids")

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Random:
    """A model to build from its configuration.

    Args:
        config: makes the configuration.
        picture: makes the inputs of one picture from its seed and configuration, and says how many
            placeholders it has: `pixel_values` and what comes with them.
        about: the shape in a few words.
    """

    config: Callable[[], Any]
    picture: Callable[[Any, torch.Generator], tuple[Inputs, int]]
    about: str


def _llama(**sizes: Any) -> Any:
    return transformers.LlamaConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096, **sizes
    )


def _clip(**sizes: Any) -> Any:
    return transformers.CLIPVisionConfig(image_size=336, patch_size=14, **sizes)


_CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "projection_dim": 768,
}  # fmt: skip
_VICUNA_7B = {
    "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
_MID_TOWER = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 8, "projection_dim": 512,
}  # fmt: skip
_MID_TEXT = {
    "vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip


def _llava(tower: Mapping[str, Any], text: Mapping[str, Any]) -> Any:
    text_config = _llama(**text)
    return transformers.LlavaConfig(
        vision_config=_clip(**tower), text_config=text_config, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_token_index=text_config.vocab_size - 1,
        image_seq_length=576,
    )  # fmt: skip


def _llava_next() -> Any:
    return transformers.LlavaNextConfig(
        vision_config=_clip(**_CLIP_L), text_config=_llama(**_VICUNA_7B), vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_token_index=32063,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    )  # fmt: skip


def _qwen() -> Any:
    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]
        },
    }  # fmt: skip
    tower = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=tower, image_token_id=151655, video_token_id=151656,
        vision_start_token_id=151652, vision_end_token_id=151653,
    )  # fmt: skip


def _one_tile(config: Any, draw: torch.Generator) -> tuple[Inputs, int]:
    tower = config.vision_config
    side = tower.image_size
    pixels = torch.randn(1, 3, side, side, generator=draw)
    return {"pixel_values": pixels}, (side // tower.patch_size) ** 2


def _five_tiles(config: Any, draw: torch.Generator) -> tuple[Inputs, int]:
    """A square picture of two by two tiles: 576 patches small, 48 rows of 48 and a break each."""
    pixels = torch.randn(1, 5, 3, 336, 336, generator=draw)
    sizes = torch.tensor([[672, 672]])
    return {"pixel_values": pixels, "image_sizes": sizes}, 576 + 48 * 49


def _packed(config: Any, draw: torch.Generator) -> tuple[Inputs, int]:
    """1008 x 1008 pixels: 72 x 72 patches, four of which are one token."""
    pixels = torch.randn(72 * 72, 3 * 2 * 14 * 14, generator=draw)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 72, 72]])}, 36 * 36


#: What `--model` can build.
RANDOM = {
    "mid": Random(
        lambda: _llava(_MID_TOWER, _MID_TEXT), _one_tile,
        "LLaVA with 576 visual tokens, a tower of 12 x 512 and a decoder of 12 x 1024",
    ),
    "llava-1.5-7b": Random(
        lambda: _llava(_CLIP_L, _VICUNA_7B), _one_tile, "LLaVA-1.5-7B, 576 visual tokens"
    ),
    "llava-next-7b": Random(
        _llava_next, _five_tiles, "LLaVA-NeXT-7B (Vicuna), 2880 visual tokens and 48 line breaks"
    ),
    "qwen2.5-vl-7b": Random(_qwen, _packed, "Qwen2.5-VL-7B, 1296 visual tokens"),
}  # fmt: skip
#: The model that ships with the package.
TINY = "tiny"


class Subject:
    """A model to measure, and prompts for it.

    Args:
        name: one of `RANDOM`, "tiny", or a Hugging Face id or folder.
        device: as torch names it.
        dtype: "auto" (as stored; of random weights bfloat16 on a GPU, else float32) or the name of
            a torch dtype.

    Raises:
        DemoError: there is no such device or model.
    """

    def __init__(self, name: str, device: str, dtype: str = "auto") -> None:
        self.name = name
        self.device = torch.device(device)
        self._random = RANDOM.get(name)
        self._assistant: Assistant | None = None
        if self._random is None:
            self._assistant = Assistant(None if name == TINY else name, device, dtype)
            self.model: Any = self._assistant.model
        else:
            self.model = build(self._random.config(), self.device, _dtype(dtype, self.device))
        # Nothing ends a benchmark before its time.
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = self.pad
        self.model.generation_config.do_sample = False

    @property
    def trained(self) -> bool:
        """Whether answers mean anything."""
        return self._random is None

    @property
    def about(self) -> str:
        """The model in a few words."""
        if self._random is not None:
            return f"{self._random.about}, random weights"
        assert self._assistant is not None
        return self._assistant.name

    @property
    def pad(self) -> int:
        """The id on padding."""
        found = self.model.config.get_text_config().pad_token_id
        return 0 if found is None else int(found)

    def request(self, seed: int = 0, words: int = AFTER) -> Inputs:
        """One prompt `[1, L]` with one picture, on the device.

        Args:
            seed: of picture and question.
            words: tokens after the picture; of a model with a processor the questions are what
                they are.
        """
        made = self._asked(seed, words) if self._assistant else self._drawn(seed, words)
        return {name: value.to(self.device) for name, value in made.items()}

    def batch(self, size: int) -> Inputs:
        """So many prompts of one length, with pictures of their own where weights are random."""
        alike = 0 if self._assistant else 1
        return self.joined([self.request(alike * at) for at in range(size)])

    def joined(self, requests: Sequence[Inputs]) -> Inputs:
        """Requests as one batch, padded at the left."""
        length = max(request["input_ids"].shape[1] for request in requests)
        out = {}
        for name in requests[0]:
            parts = [request[name] for request in requests]
            if name in _PADDED:
                fill = self.pad if name == "input_ids" else 0
                parts = [
                    torch.nn.functional.pad(part, (length - part.shape[1], 0), value=fill)
                    for part in parts
                ]
            out[name] = torch.cat(parts)
        return out

    @cached_property
    def patches(self) -> int:
        """Visual tokens of a picture, without what is no patch (line breaks)."""
        ids = self.request()["input_ids"]
        count = int((ids == self.model.config.image_token_id).sum())
        return count - (48 if self.name == "llava-next-7b" else 0)

    def _drawn(self, seed: int, words: int) -> Inputs:
        assert self._random is not None
        config: Any = self.model.config
        draw = torch.Generator().manual_seed(seed)
        picture, count = self._random.picture(config, draw)
        text = torch.randint(10, 10_000, (BEFORE + words,), generator=draw).tolist()
        image = [config.image_token_id] * count
        if config.model_type.startswith("qwen"):
            image = [config.vision_start_token_id, *image, config.vision_end_token_id]
        ids = torch.tensor([[*text[:BEFORE], *image, *text[BEFORE:]]])
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
        if config.model_type.startswith("qwen"):
            made["mm_token_type_ids"] = (ids == config.image_token_id).long()
        made["pixel_values"] = made["pixel_values"].to(self.model.dtype)
        return made

    def _asked(self, seed: int, words: int) -> Inputs:
        """A synthetic scene and a question about it, one that the model can take."""
        from PIL import Image

        assert self._assistant is not None
        kind = QUESTION_TYPES[seed % len(QUESTION_TYPES)]
        ((scene, question),) = sample_questions(1, seed, (kind,))
        image, text = Image.fromarray(scene.image), _SHIPPED_QUESTION
        if not self._assistant.shipped:
            image, text = image.resize((PICTURE, PICTURE)), _QUESTION
        elif seed:
            text = question.text
        return dict(self._assistant.ask(image, text).inputs)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def build(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of a configuration, its weights drawn on the device.

    Raises:
        DemoError: it does not fit there.
    """
    find(config)  # refuse what can't be patched
    config.dtype = dtype
    kind = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = kind(config)
    except torch.OutOfMemoryError as error:
        raise DemoError(f"the model does not fit on {device}") from error
    finally:
        torch.set_default_dtype(before)
    if device.type != "meta":
        _draw(model, device)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _draw(model: Any, device: torch.device) -> None:
    """Matrices normal of variance 1 / fan-in, norms 1, biases 0."""
    draw = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            fan_in = weight.shape[-1] if "embed" in name else weight[0].numel()
            weight.normal_(0.0, fan_in**-0.5, generator=draw)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
