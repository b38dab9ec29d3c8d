# SPDX-License-Identifier: Apache-2.0
"""`inspect_adapter`: the contents of an adapter's file, of any writer. It needs no base model and
reads no tensor.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from .base.constants import CONFIG_NAME, MODEL_ROOT, WEIGHTS_FILES
from .base.errors import PeftError
from .base.plain_values import JsonObject
from .base.registry import PEFT_TYPE_TO_CONFIG_MAPPING, lookup
from .base.suggestions import listed
from .base.tables import alike, counted, in_bytes, linear_map, sizes, table
from .checkpoint.files import read_json
from .checkpoint.format import ModuleShape
from .checkpoint.headers import FileHeader, TensorInfo, read_header
from .checkpoint.hub import find_file, only_hub_options
from .checkpoint.key_groups import KeyGroups, group_keys, module_shapes
from .checkpoint.paths import check_path
from .config import PeftConfig
from .tuners.lokr.files.keys import split_stem
from .tuners.lokr.files.reading import writer_of

# Fields of a config that the report shows apart, or that say nothing of the adapter.
_APART = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "revision", "task_type",
})  # fmt: skip


@dataclass
class ModuleContents:
    """An adapter's tensors for one module.

    Attributes:
        path: The module's path; in some programs' files with `_` for dots.
        component: Prefix of the path that tells the models of a pipeline apart; "" without one.
        method: The method's name.
        tensors: The tensors by the end of their keys.
        shape: The module's size and the adapter's rank, None if the tensors do not tell.
    """

    path: str
    component: str
    method: str
    tensors: dict[str, TensorInfo]
    shape: ModuleShape | None = None


@dataclass(repr=False)
class AdapterContents:
    """The contents of an adapter's file. Print it for a table.

    Attributes:
        source: Path of the file.
        writer: The program that wrote it, as far as the file tells.
        methods: Names of the methods whose tensors it has, or that its config names.
        config: The fields of its config; None without one.
        modules: The tensors of each adapted module.
        shared: Tensors that all modules share, by key.
        companions: Other tensors by key: modules, biases or embedding rows trained in full.
        file_bytes: Size of the file.
        header_bytes: Size of its header, which lists the tensors; 0 if it has none.
        metadata: The text in the header.
        problems: Sentences about what does not fit together.
    """

    source: str
    writer: str
    methods: list[str]
    config: JsonObject | None
    modules: list[ModuleContents] = field(default_factory=list)
    shared: dict[str, TensorInfo] = field(default_factory=dict)
    companions: dict[str, TensorInfo] = field(default_factory=dict)
    file_bytes: int = 0
    header_bytes: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def ranks(self) -> dict[int | None, int]:
        """Number of modules by the adapter's rank there; None where factors are full."""
        shapes = (module.shape for module in self.modules)
        counts = Counter(shape.rank for shape in shapes if shape is not None)
        return dict(sorted(counts.items(), key=lambda item: item[0] or 0))

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of parameters by dtype."""
        counts: Counter[str] = Counter()
        for tensor in self._tensors():
            counts[tensor.dtype] += tensor.numel
        return dict(counts.most_common())

    @property
    def parameters(self) -> int:
        """Number of parameters in the file."""
        return sum(tensor.numel for tensor in self._tensors())

    @property
    def header_share(self) -> float:
        """Share of the file that its header takes."""
        return self.header_bytes / max(self.file_bytes, 1)

    def _tensors(self) -> Iterator[TensorInfo]:
        for module in self.modules:
            yield from module.tensors.values()
        yield from self.shared.values()
        yield from self.companions.values()

    def to_dict(self) -> JsonObject:
        """Return the report as values of JSON."""
        return {
            "source": self.source,
            "writer": self.writer,
            "methods": self.methods,
            "config": self.config,
            "file_bytes": self.file_bytes,
            "header_bytes": self.header_bytes,
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "ranks": {"full" if rank is None else str(rank): n for rank, n in self.ranks.items()},
            "modules": [
                {
                    "path": module.path,
                    "component": module.component,
                    "method": module.method,
                    "size": None if module.shape is None else _size_of(module.shape),
                    "rank": None if module.shape is None else module.shape.rank,
                    "tensors": _as_json(module.tensors),
                }
                for module in self.modules
            ],
            "shared": _as_json(self.shared),
            "companions": _as_json(self.companions),
            "metadata": self.metadata,
            "problems": self.problems,
        }

    def __repr__(self) -> str:
        return (
            f"<AdapterContents: {', '.join(self.methods) or 'no known method'} on "
            f"{counted(len(self.modules), 'module')}, {self.parameters:,} parameters, "
            f"{in_bytes(self.file_bytes)}; print it for a table>"
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.source}: {', '.join(self.methods) or 'no known method'}, from {self.writer}"
        if self.config is not None:
            yield from _config_lines(self.config)
        cells = {
            f"{module.component}.{module.path}" if module.component else module.path: (
                "?" if module.shape is None else _size_of(module.shape),
                _rank_of(module.shape),
                ", ".join(_with_shapes(module.tensors)),
                f"{sum(tensor.numel for tensor in module.tensors.values()):,}",
            )
            for module in self.modules
        }
        if cells:
            heading = ("module", "size", "rank", "tensors", "parameters")
            yield table([heading, *alike(cells)], right=[4])
        for title, tensors in (("shared", self.shared), ("beside the layers", self.companions)):
            if tensors:
                yield f"{title}: {listed(_with_shapes(tensors), most=4)}"
        share = f", of which {self.header_share:.1%} header" if self.header_bytes else ""
        dtypes = ", ".join(self.dtypes) or "no values"
        yield (
            f"{counted(len(self.modules), 'module')}, {self.parameters:,} parameters ({dtypes}), "
            f"{self.file_bytes:,} bytes{share}"
        )
        yield from (f"! {problem}" for problem in self.problems)


def inspect_adapter(source: str | os.PathLike[str], **hub_options: object) -> AdapterContents:
    """Report the contents of an adapter's file: writer, method, modules, ranks, dtypes and bytes.

    No base model is needed and no tensor is read, so files of any size take a moment.

    Args:
        source: An adapter's folder, a weights file of any program (Hugging Face PEFT, LyCORIS,
            kohya's scripts, diffusers, …), or an id on the Hub.
        **hub_options: `subfolder`, `revision`, `token`, `cache_dir`, …

    Returns:
        A report to print or to read.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is damaged, or not a weights file.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     contents = inspect_adapter(folder)
        >>> contents
        <AdapterContents: LORA on 1 module, 24 parameters, 408 B; print it for a table>
        >>> contents.modules[0].shape.out_features, contents.ranks
        (4, {2: 1})
    """
    check_path(source, "a folder's or file's path, or the name of a repository on the Hub")
    if Path(source).is_file():
        path = Path(source)
    else:
        path = find_file(source, WEIGHTS_FILES, only_hub_options(hub_options, "inspect_adapter"))
    header, problems = read_header(path), list[str]()
    config = _config_beside(path, problems)
    groups = group_keys(header.tensors)
    methods = sorted(set(groups.methods.values()))
    named = None if config is None else str(config.get("peft_type"))
    if named is not None and methods and methods != [named]:
        problems.append(f"The config is of {named}, the tensors are of {', '.join(methods)}.")
    if not methods and not groups.shared:
        problems.append(_unknown(header))
    return AdapterContents(
        source=str(path),
        writer=_writer(header, config),
        methods=methods or ([named] if named else []),
        config=config,
        modules=list(_modules(header, groups)),
        shared={key: header.tensors[key] for key in groups.shared},
        companions={key: header.tensors[key] for key in groups.others},
        file_bytes=header.file_bytes,
        header_bytes=header.header_bytes,
        metadata=header.metadata,
        problems=problems,
    )


def _config_beside(path: Path, problems: list[str]) -> JsonObject | None:
    """Return the config beside a file of `save_pretrained`, or note why it can't be used."""
    place = path.with_name(CONFIG_NAME)
    if path.name not in WEIGHTS_FILES or not place.is_file():
        return None
    try:
        content = read_json(place)
    except PeftError as error:
        problems.append(str(error))
        return None
    try:
        PeftConfig.from_file_fields(dict(content), {})
    except PeftError as error:
        problems.append(f"Its config can't be used: {error}")
    return content


def _unknown(header: FileHeader) -> str:
    """Return a sentence about a file without tensors of a method."""
    if set(header.tensors) == {"vector_bank"}:
        rows, length = header.tensors["vector_bank"].shape
        return f"It is no adapter, but a bank of {rows:,} vectors of length {length} for adapters."
    return "No tensor belongs to a method that this package provides."


def _modules(header: FileHeader, groups: KeyGroups) -> Iterator[ModuleContents]:
    """Yield the tensors of each module."""
    shapes = module_shapes(groups, {key: info.shape for key, info in header.tensors.items()})
    for stem, keys in groups.modules.items():
        component, path, _ = split_stem(stem)
        yield ModuleContents(
            path,
            "" if component == MODEL_ROOT[:-1] else component,
            groups.methods[stem],
            {name: header.tensors[key] for name, key in keys.items()},
            shapes[stem],
        )


def _writer(header: FileHeader, config: JsonObject | None) -> str:
    """Return the program that wrote a file, as far as it tells."""
    if config is not None:
        version = config.get("peft_version")
        return f"peft {version}" if version else "Hugging Face PEFT"
    components = {split_stem(key)[0] for key in header.tensors}
    return writer_of(header.metadata, components) or "an unknown program"


def _config_lines(config: Mapping[str, object]) -> Iterator[str]:
    """Yield the base model and task, and the fields of a config that are not at their defaults."""
    base = config.get("base_model_name_or_path")
    task = config.get("task_type")
    yield f"base model: {base or 'not named'}" + (f"; task type {task}" if task else "")
    shown = {name: value for name, value in config.items() if name not in _APART}
    defaults = _defaults(config.get("peft_type"))
    options = [
        f"{name}={_short(value)}"
        for name, value in shown.items()
        if name in ("r", "target_modules") or value != defaults.get(name)
    ]
    if options:
        yield f"options: {', '.join(options)}"


def _defaults(peft_type: object) -> dict[str, object]:
    """Return the default values of a method's config fields, as a file has them."""
    try:
        cls = lookup(PEFT_TYPE_TO_CONFIG_MAPPING, peft_type)
    except PeftError:
        return {}
    return {
        item.name: item.default if item.default_factory is MISSING else item.default_factory()
        for item in fields(cls)
    }


def _short(value: object) -> str:
    """Return a value of a config, in words if it is long."""
    text = repr(value)
    if len(text) <= 160 or not isinstance(value, (dict, list)):
        return text
    return f"({len(value)} entries)"


def _with_shapes(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return tensors as words: "lora_A.weight 2x8"."""
    return [f"{name} {sizes(info.shape)}" for name, info in tensors.items()]


def _size_of(shape: ModuleShape) -> str:
    return linear_map(shape.in_features, shape.out_features, shape.kernel_size)


def _rank_of(shape: ModuleShape | None) -> str:
    if shape is None:
        return "?"
    return "full" if shape.rank is None else str(shape.rank)


def _as_json(tensors: Mapping[str, TensorInfo]) -> JsonObject:
    return {
        key: {"shape": list(info.shape), "dtype": info.dtype, "bytes": info.nbytes}
        for key, info in tensors.items()
    }
