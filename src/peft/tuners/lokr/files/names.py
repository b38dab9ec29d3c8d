# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model a file's names mean: its own paths, and the names that original
implementations of known models have.

Files of kohya's scripts and ComfyUI name the modules of Stable Diffusion XL and Flux as those
models were first published; diffusers has other names for them, and three layers where the
originals have one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from .keys import flattened

# Layers that implementations have as one or as several, by the last part of their paths; and
# outputs that one has in a list.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_kv": ("to_k", "to_v"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("query", "key", "value"),
}


class Target(NamedTuple):
    """What a name means.

    Attributes:
        paths: The module; or several, whose outputs the named layer has one after the other.
        part: Which part of the module's outputs the name means, None for all.
        parts: How many parts it has.
    """

    paths: tuple[str, ...]
    part: int | None = None
    parts: int = 1


class Names:
    """The names that files may have for modules of a model.

    Args:
        paths: The paths of its layers.
        before: What modules were called in earlier versions of the model's library, by path.
    """

    def __init__(self, paths: Iterable[str], before: Mapping[str, str] | None = None) -> None:
        self.paths = tuple(paths)
        own = {path: Target((path,)) for path in self.paths}
        tiers = (
            own,
            {
                name: target
                for name, target in _aliases(set(self.paths), before or {})
                if name not in own
            },
        )
        self._dotted = [{name: {target} for name, target in tier.items()} for tier in tiers]
        self._flat: list[dict[str, set[Target]]] = [{}, {}]
        for flat, tier in zip(self._flat, tiers, strict=True):
            for name, target in tier.items():
                flat.setdefault(flattened(name), set()).add(target)

    def meaning(self, name: str, flat: bool) -> set[Target]:
        """What a name can mean: the model's own paths first, and other names where there is none."""
        for tier in self._flat if flat else self._dotted:
            if name in tier:
                return tier[name]
        return set()

    def originals(self) -> list[tuple[str, tuple[str, ...]]]:
        """The names of the original implementation with the layers that each means, a name for a
        layer.
        """
        paths, named, result = set(self.paths), set[str](), []
        for name, target in sorted(
            (*_unet(paths), *_flux(paths)), key=lambda item: -len(item[1].paths)
        ):
            if paths.issuperset(target.paths) and named.isdisjoint(target.paths):
                named.update(target.paths)
                result.append((name, target.paths))
        return result


def _aliases(paths: Collection[str], before: Mapping[str, str]) -> Iterator[tuple[str, Target]]:
    """All names that are not the model's own. Where two mean different things for the same name,
    the first counts.
    """
    seen: set[str] = set()
    earlier = [(before[path], Target((path,))) for path in paths if path in before]
    for name, target in (
        *earlier,
        *_towers(paths),
        *_unet(paths),
        *_flux(paths),
        *_fused(paths),
        *_parts(paths),
    ):
        if name not in seen and all(path in paths for path in target.paths):
            seen.add(name)
            yield name, target


def _towers(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """The parts of a CLIP encoder, which have a `text_model.` or `vision_model.` around them in
    some versions and not in others.
    """
    for path in paths:
        tower, _, inner = path.partition(".")
        if tower in ("text_model", "vision_model"):
            yield inner, Target((path,))
        elif path.startswith("encoder.layers."):
            yield from (
                (f"{name}.{path}", Target((path,))) for name in ("text_model", "vision_model")
            )


def _fused(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """One layer in the file, several in the model."""
    for parent, own in _children(paths).items():
        for name, members in _FUSED.items():
            if set(members) <= own:
                yield (
                    _under(parent, name),
                    Target(tuple(_under(parent, member) for member in members)),
                )
        if "to_out.0" in own:
            yield _under(parent, "to_out"), Target((_under(parent, "to_out.0"),))
            yield _under(parent, "out"), Target((_under(parent, "to_out.0"),))


def _parts(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Several layers in the file, one in the model."""
    for parent, own in _children(paths).items():
        for name, members in _FUSED.items():
            if name in own:
                for part, member in enumerate(members):
                    yield (
                        _under(parent, member),
                        Target((_under(parent, name),), part, len(members)),
                    )


def _children(paths: Collection[str]) -> Mapping[str, set[str]]:
    children: dict[str, set[str]] = {}
    for path in paths:
        parent, _, name = path.rpartition(".")
        children.setdefault(parent, set()).add(name)
        if name.isdigit():
            above, _, last = parent.rpartition(".")
            children.setdefault(above, set()).add(f"{last}.{name}")
    return children


def _under(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _unet(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Stable Diffusion's names for diffusers' UNet: blocks are numbered through, with a
    resolution's change as one of them.
    """
    resnet = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    plain = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    }
    yield from ((original, Target((path,))) for original, path in plain.items())
    blocks: dict[str, str] = {}  # theirs → ours
    number = 1
    for i in range(_count(paths, r"down_blocks\.(\d+)\.")):
        for j in range(_count(paths, rf"down_blocks\.{i}\.resnets\.(\d+)\.")):
            blocks[f"input_blocks.{number}.0"] = f"down_blocks.{i}.resnets.{j}"
            blocks[f"input_blocks.{number}.1"] = f"down_blocks.{i}.attentions.{j}"
            number += 1
        blocks[f"input_blocks.{number}.0.op"] = f"down_blocks.{i}.downsamplers.0.conv"
        number += 1
    blocks |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0"}
    blocks["middle_block.2"] = "mid_block.resnets.1"
    number = 0
    for i in range(_count(paths, r"up_blocks\.(\d+)\.")):
        for j in range(layers := _count(paths, rf"up_blocks\.{i}\.resnets\.(\d+)\.")):
            blocks[f"output_blocks.{number}.0"] = f"up_blocks.{i}.resnets.{j}"
            blocks[f"output_blocks.{number}.1"] = f"up_blocks.{i}.attentions.{j}"
            if j == layers - 1:
                place = (
                    2 if any(path.startswith(f"up_blocks.{i}.attentions.") for path in paths) else 1
                )
                blocks[f"output_blocks.{number}.{place}.conv"] = f"up_blocks.{i}.upsamplers.0.conv"
            number += 1
    ours = {path: original for original, path in blocks.items()}
    ends = {name: original for original, name in resnet.items()}
    for path in paths:
        block = next(
            (
                path[: m.end()]
                for m in [re.match(r"\w+(\.\d+)?\.(resnets|attentions)\.\d+", path)]
                if m
            ),
            path,
        )
        if block in ours:
            end = path[len(block) + 1 :]
            yield _joined(ours[block], ends.get(end, end)), Target((path,))


def _joined(block: str, end: str) -> str:
    return f"{block}.{end}" if end else block


def _count(paths: Collection[str], pattern: str) -> int:
    """One more than the largest number at a place in the paths."""
    return max((int(m.group(1)) + 1 for path in paths if (m := re.match(pattern, path))), default=0)


def _flux(paths: Collection[str]) -> Iterator[tuple[str, Target]]:
    """Flux's names, first and second version, for diffusers' models."""
    attention = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
    for i in range(_count(paths, r"transformer_blocks\.(\d+)\.")):
        theirs, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, own, more in zip(("img", "txt"), attention, ("", "_context"), strict=True):
            yield (
                f"{theirs}.{stream}_attn.qkv",
                Target(tuple(f"{ours}.attn.{name}" for name in own)),
            )
            fused = "to_qkv" if stream == "img" else "to_added_qkv"
            yield f"{theirs}.{stream}_attn.qkv", Target((f"{ours}.attn.{fused}",))
            out = "to_out.0" if stream == "img" else "to_add_out"
            yield f"{theirs}.{stream}_attn.proj", Target((f"{ours}.attn.{out}",))
            yield f"{theirs}.{stream}_mod.lin", Target((f"{ours}.norm1{more}.linear",))
            for place, names in (
                ("0", ("net.0.proj", "linear_in")),
                ("2", ("net.2", "linear_out")),
            ):
                yield from (
                    (f"{theirs}.{stream}_mlp.{place}", Target((f"{ours}.ff{more}.{name}",)))
                    for name in names
                )
    for i in range(_count(paths, r"single_transformer_blocks\.(\d+)\.")):
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        parts = *(f"{ours}.attn.{name}" for name in attention[0]), f"{ours}.proj_mlp"
        yield f"{theirs}.linear1", Target(parts)
        yield f"{theirs}.linear1", Target((f"{ours}.attn.to_qkv_mlp_proj",))
        yield from (
            (f"{theirs}.linear2", Target((f"{ours}.{name}",)))
            for name in ("proj_out", "attn.to_out")
        )
        yield f"{theirs}.modulation.lin", Target((f"{ours}.norm.linear",))
    yield from ((original, Target((path,))) for original, path in _FLUX_ENDS)


_FLUX_ENDS = [
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("time_in.in_layer", "time_guidance_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_guidance_embed.timestep_embedder.linear_2"),
    ("guidance_in.in_layer", "time_guidance_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_guidance_embed.guidance_embedder.linear_2"),
    ("single_stream_modulation.lin", "single_stream_modulation.linear"),
    ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
]
