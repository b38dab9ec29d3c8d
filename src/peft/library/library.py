# SPDX-License-Identifier: Apache-2.0
"""`AdapterLibrary`: a folder of adapters, indexed, searched, checked and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

from torch import nn

from ..base.errors import CheckpointError, CheckpointNotFoundError, PeftValueError, warn
from ..base.validation import at_least, check_adapter, check_flags
from ..checkpoint.hub import local_folder, only_hub_options
from ..checkpoint.paths import as_path, check_path
from ..peft_model import PeftModel
from ..tuners.routed import get_routed_model as route_over
from . import adding, checking
from .catalog import Catalog
from .content import Content, ContentCache, LoadedAdapter
from .entry import AdapterEntry, Place, checked_scores, checked_tags
from .index import INDEX_NAME, Index, IndexFile, LeftOut
from .listing import AdapterList, LibraryReport, select
from .naming import Names, name_of
from .placing import check_one_base, put_on
from .reading import Reader
from .refreshing import LibraryChanges, look


class AdapterLibrary:
    """The adapters below a folder.

    An index in the folder, `adapter_library.jsonl`, holds what one needs to choose: a line for each
    adapter. Opening the library brings it up to date: only what changed is read. Adapters that are
    broken, or that this package can't load, are left out with the reason.

    Several processes and threads may use a library at once. A process that is killed leaves the
    index as it was or as it is now.

    Args:
        folder: The folder. Adapters may lie at any depth in it, in folders of their own or in packs
            (`AdapterPack`).
        index: File of the index, for folders that can't be written to.
        follow_links: Read what symbolic links lead to; else they are left out.
        max_bytes: Bound on the adapters that `load` keeps in memory.
        refresh: False takes the index as it is, without a look at the files.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CheckpointError: The index is of a newer version, or can't be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from peft import LoraConfig, get_peft_model
        >>> folder = TemporaryDirectory()
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        >>> model.save_pretrained(f"{folder.name}/sums")
        >>> library = AdapterLibrary(folder.name)
        >>> library.tag("sums", "math")
        >>> library.filter(tags="math").names, library["sums"].rank
        (['sums'], 2)
        >>> len(library.load("sums").tensors)
        2
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        follow_links: bool = False,
        max_bytes: int = 1 << 30,
        refresh: bool = True,
    ) -> None:
        check_path(folder, "the path of a folder with adapters")
        check_flags(follow_links=follow_links, refresh=refresh)
        for problem in at_least("max_bytes", max_bytes, 0, most=None):
            raise PeftValueError(problem)
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointNotFoundError(
                f"There is no folder '{self.folder}'. A library is a folder that exists, with "
                "adapters in it or to be put into it."
            )
        self.index_file = self.folder / INDEX_NAME if index is None else as_path(index, "index")
        self._follow_links = follow_links
        self._cache = ContentCache(max_bytes)
        self._reader = Reader(self.folder, self._cache)
        self._lock = RLock()
        self._file = IndexFile(self.index_file)
        # Replaced as a whole, so that other threads see names and places that agree.
        self._catalog = Catalog(self.folder, Index() if refresh else self._file.read())
        if refresh:
            self.refresh()

    def _change(self, change: Callable[[Index], object], required: bool = True) -> Index:
        """Change the index, in its file and here."""
        with self._lock:
            index = self._file.change(change, required)
            self._catalog = Catalog(self.folder, index)
        return index

    def __getstate__(self) -> dict[str, object]:
        """Leave out the lock, which can't be copied."""
        return {key: value for key, value in vars(self).items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = RLock()

    def __repr__(self) -> str:
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"AdapterLibrary('{self.folder}', {len(self)} adapters{left})"

    def __str__(self) -> str:
        lines = [str(self.entries)]
        left = self.left_out
        lines += [f"left out: '{path}'. {reason}" for path, reason in left[:8]]
        lines += [f"left out: {len(left) - 8} more; see `left_out`"] if len(left) > 8 else []
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self._catalog.names)

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name_of(name) in self._catalog.names

    def __getitem__(self, name: str | AdapterEntry) -> AdapterEntry:
        """Return the entry of an adapter, by its name or by its folder's path in the library.

        Raises:
            PeftValueError: There is none.
        """
        return self._catalog.find(name)

    @property
    def entries(self) -> AdapterList:
        """All adapters, by name."""
        return self._catalog.entries()

    @property
    def names(self) -> list[str]:
        """The names of all adapters, sorted."""
        return sorted(self._catalog.names)

    @property
    def left_out(self) -> list[LeftOut]:
        """Folders, links and files that look like adapters and are none, with the reason."""
        return self._catalog.left_out()

    @property
    def loaded_bytes(self) -> int:
        """Memory that loaded adapters take, at most `max_bytes`."""
        return self._cache.nbytes

    def filter(
        self,
        *,
        method: str | Collection[str] | None = None,
        base_model: str | None = None,
        task_type: str | None = None,
        tags: str | Collection[str] | None = None,
        task: str | None = None,
        rank: int | None = None,
        min_scores: Mapping[str, float] | None = None,
        where: Callable[[AdapterEntry], object] | None = None,
    ) -> AdapterList:
        """Return the adapters that have all of some properties.

        Args:
            method: Name of the method, or several of which any will do.
            base_model: `base_model_name_or_path` of the config.
            task_type: `task_type` of the config.
            tags: A tag, or several that an adapter must all have.
            task: Name of a task that it has.
            rank: `r` of the config.
            min_scores: Least value of scores, by name.
            where: A further test of an entry.

        Raises:
            PeftValueError: No adapter of the library has such a score, or no method that name.

        Example:
            `library.filter(method="LORA", tags="math", min_scores={"accuracy": 0.8})`
        """
        return select(
            self.entries,
            method=method,
            base_model=base_model,
            task_type=task_type,
            tags=tags,
            task=task,
            rank=rank,
            min_scores=min_scores,
            where=where,
        )

    def refresh(self) -> LibraryChanges:
        """Bring the index up to date with the files. Files that did not change are not read.

        Names, tags and scores stay. An adapter whose folder was moved keeps its tags and scores.

        Returns:
            Names of the adapters that were added, changed and dropped.
        """
        with self._lock:
            before = self._file.read()
        findings = look(self.folder, before, self._follow_links)
        index = self._change(lambda index: findings.apply(self.folder, index), required=False)
        changes = LibraryChanges.between(before, index)
        for place in before.entries.keys() - index.entries.keys():
            self._cache.drop(place)
        if changes.left_out:
            shown = "; ".join(
                f"'{path}': {index.left_out[path].reason}" for path in changes.left_out[:3]
            )
            more = f"; and {len(changes.left_out) - 3} more" if changes.left_out[3:] else ""
            warn(f"Left out of the library '{self.folder}', see `left_out`: {shown}{more}")
        return changes

    def add(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        tags: str | Iterable[str] = (),
        scores: Mapping[str, float] | None = None,
        **hub_options: object,
    ) -> AdapterEntry:
        """Add an adapter.

        Args:
            source: A folder in the library (for one that was removed, or to name and tag it); any
                other folder, which is copied into the library; or an id on the Hub, of which the
                index keeps the commit.
            name: By default made of the folder's path, or of the id.
            tags, scores: As for `tag` and `score`.
            **hub_options: `subfolder`, `revision`, `token`, …

        Returns:
            The entry.

        Raises:
            CheckpointNotFoundError: There is no such adapter.
            CheckpointError: It is broken, or this package can't load it; nothing is added.
            PeftValueError: The name is taken or can't be one.
        """
        check_path(source)
        options = only_hub_options(hub_options, "add")
        if "cache_dir" in options:
            raise PeftValueError(
                "An index names no folders outside the library, so `cache_dir` can't be kept in "
                "it; set the environment variable HF_HUB_CACHE."
            )
        words, numbers = checked_tags(tags), checked_scores(scores)
        folder = local_folder(source, options.get("subfolder"))
        if folder is not None and not folder.is_dir():
            raise CheckpointNotFoundError(f"'{source}' has no folder '{options['subfolder']}'.")
        if folder is None:
            entry = adding.on_hub(os.fspath(source), options)
            place = entry.place
            if name is not None:
                self._catalog.check_new(name, place)
            self._change(lambda index: index.put(entry))
        else:
            place = Place(adding.path_in(self.folder, folder, name))
            if name is not None:
                self._catalog.check_new(name, place)
            adding.copy_in(self.folder, folder, place.path)
            self._change(lambda index: index.forget([place]))
            self.refresh()
        index = self._catalog.index
        if place not in index.entries:
            left = index.left_out.get(place.path)
            why = "It has no adapter." if left is None else left.reason
            raise CheckpointError(f"'{source}' can't be added to the library. {why}")
        if name is not None or words or numbers:
            self._edit(
                index.entries[place].name,
                lambda entry: replace(
                    entry,
                    name=name or entry.name,
                    tags=checked_tags([*entry.tags, *words]),
                    scores={**entry.scores, **numbers},
                ),
            )
        return self._catalog.index.entries[place]

    def remove(self, names: Names, *, delete_files: bool = False) -> None:
        """Remove adapters from the index. Their files stay, and are passed over until `add`.

        Args:
            names: Their names; or paths of what is left out, which is then no longer reported; or
                names of adapters whose files are gone, whose tags and scores are then forgotten.
            delete_files: Delete the files too. Members of a pack are removed from it.

        Raises:
            PeftValueError: A name is unknown, or files are to be deleted that are on the Hub;
                nothing is removed.
        """
        check_flags(delete_files=delete_files)
        places = self._catalog.places(names)
        if delete_files and (far := [place for place in places if place.repo]):
            raise PeftValueError(
                f"'{far[0]}' is on the Hub; its files belong to the cache of huggingface_hub. "
                "Remove it without `delete_files`."
            )
        self._change(lambda index: index.remove(places))
        for place in places:
            self._cache.drop(place)
        if delete_files:
            adding.delete(self.folder, places)
            self._change(lambda index: index.forget(places))
            self.refresh()

    def rename(self, name: str, new_name: str) -> None:
        """Give an adapter another name. Its files stay where they are.

        Raises:
            PeftValueError: There is no such adapter, or the new name is taken or can't be one.
        """
        old = self._catalog.find(name).name
        if new_name != old:
            self._catalog.check_new(new_name, self._catalog.names[old].place)
            self._edit([old], lambda entry: replace(entry, name=new_name))

    def tag(self, names: Names, *tags: str, remove: str | Iterable[str] = ()) -> None:
        """Give tags to adapters, and take others away.

        Args:
            names: One name, or several.
            *tags: Tags to give.
            remove: Tags to take away.
        """
        given, gone = checked_tags(tags), set(checked_tags(remove, "remove"))
        self._edit(
            names, lambda entry: replace(entry, tags=tuple(sorted({*entry.tags, *given} - gone)))
        )

    def score(self, name: str, **scores: float | None) -> None:
        """Set scores of an adapter: `library.score("sums", accuracy=0.9)`. None takes one away."""
        given = checked_scores({key: v for key, v in scores.items() if v is not None})
        gone = scores.keys() - given.keys()
        self._edit(
            name,
            lambda entry: replace(
                entry, scores={k: v for k, v in {**entry.scores, **given}.items() if k not in gone}
            ),
        )

    def check(self, names: Names | None = None) -> LibraryReport:
        """Read the files of adapters again and compare them with the index.

        Args:
            names: Which adapters, by default all.

        Returns:
            A report that prints as a table; `report.ok` is true if all are as they were indexed.
        """
        return checking.check(
            self.folder,
            self._catalog.index,
            None if names is None else self._catalog.find_all(names),
            self._reader,
            self._follow_links,
        )

    def load(self, name: str) -> LoadedAdapter:
        """Return an adapter's config and tensors, on the CPU.

        They are read at the first call and kept while they are among the most recently used that
        `max_bytes` holds. A VB-LoRA bank that several share is read and held once.

        Raises:
            PeftValueError: There is no such adapter.
            CheckpointNotFoundError: Its files, or the bank that it uses, are gone.
            CheckpointError: Its weights or config changed since they were indexed, or are damaged.
        """
        return self.content(name).adapter()

    def content(self, name: str) -> Content:
        """Return an adapter as it is stored, from memory or from its files."""
        return self._reader.content(self._catalog.find(name))

    def add_to(
        self,
        model: nn.Module,
        names: Names | Mapping[str, str],
        *,
        autocast_adapter_dtype: bool = True,
    ) -> PeftModel:
        """Put adapters on a model, all of them or none. They are frozen.

        Args:
            model: A `PeftModel`, on which they are inactive until `set_adapter`; or a base model,
                which becomes one with the first of them active, a `PeftMixedModel` if they are of
                several methods.
            names: Their names, which they have on the model too; or a dictionary that gives each a
                name there.
            autocast_adapter_dtype: Keep adapters in float32 where the base has 16 bits.

        Returns:
            The `PeftModel`.

        Raises:
            PeftValueError: A name is unknown, or taken on the model.
            CheckpointError: An adapter's files are broken, or do not fit the model. In all cases
                the model is as it was.
        """
        check_flags(autocast_adapter_dtype=autocast_adapter_dtype)
        if isinstance(names, Mapping):
            for new in names.values():
                check_adapter(new)
            pairs = {new: self._catalog.find(name) for name, new in names.items()}
            if len(pairs) < len(names):
                raise PeftValueError(f"`names`={dict(names)} gives one name to several adapters.")
        else:
            pairs = {entry.name: entry for entry in self._catalog.find_all(names)}
        contents = {new: self._reader.content(entry) for new, entry in pairs.items()}
        return put_on(model, contents, autocast_adapter_dtype)

    def route(
        self, model: nn.Module, names: Names | None = None, *, general: Names = (), **options: Any
    ) -> PeftModel:
        """Return a model that chooses among adapters of the library, as `get_routed_model` does.

        Args:
            model: The base model; the routing is put into it in place.
            names: The adapters to route over, of any methods and ranks; by default all. One with
                several tasks gives an expert for each.
            general: Adapters whose mean delta is subtracted from each.
            **options: Arguments of `get_routed_model`: fields of `RoutedConfig` (`routing`,
                `top_k`, …), or `config`; and `adapter_name`.

        Raises:
            PeftValueError: A name is unknown; or all are asked for, and they are for several base
                models.
            CheckpointError: An adapter's weights or config changed since they were indexed, or are
                damaged, or do not fit the model.
            As `get_routed_model`; the model is left as it was.

        Example:
            `library.route(base_model, library.filter(tags="math"), routing="arrow", top_k=2)`
        """
        chosen = self._catalog.find_all(self.entries if names is None else names)
        if names is None:
            check_one_base(chosen)
        beside = self._catalog.find_all(general)
        return route_over(
            model,
            {entry.name: self._reader.source(entry) for entry in chosen},
            general_experts={entry.name: self._reader.source(entry) for entry in beside} or None,
            **options,
        )

    def _edit(self, names: Names, edit: Callable[[AdapterEntry], AdapterEntry]) -> None:
        """Change entries of the index, which others may have changed in the meantime."""
        places = {entry.place: entry.name for entry in self._catalog.find_all(names)}

        def change(index: Index) -> None:
            taken = index.names()
            for place, name in places.items():
                if place not in index.entries:
                    raise PeftValueError(
                        f"{name!r} was removed from the library by another process; `refresh()`."
                    )
                new = edit(index.entries[place])
                if taken.get(new.name, new).place != place:
                    raise PeftValueError(
                        f"The library has an adapter {new.name!r} already; choose another name."
                    )
                index.entries[place] = new

        self._change(change)
