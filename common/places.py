"""Where a store's files lie: a folder of this machine, or an object store behind a URL. The one owner of fsspec.

A store behind a URL is known here by the path of its mirror, a folder under `mirrors()` that keeps what was read of it;
the path tells the URL. So everything that takes the path of a store takes such a one. An object is there whole or not
at all, which is what a folder needs writing aside and renaming for.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Any, final

from pydantic import AfterValidator, BeforeValidator

from common.errors import ConfigError, StoreError
from common.files import ASIDE, crc32c, put_in_place, write_aside, write_file


def mirrors() -> Path:
    """Where chunks of object stores are kept: `$GRANARY_MIRRORS`, or `~/.cache/granary`."""
    return Path(os.environ.get("GRANARY_MIRRORS") or "~/.cache/granary").expanduser().absolute()


def local_path(location: str | Path) -> Path:
    """`s3://bucket/x.zarr` as the path of its mirror; of a folder, which `file://` may say too, the path itself.

    Raises:
        ConfigError: a URL that ends where a name should begin.
    """
    scheme, mark, rest = str(location).partition("://")
    if mark and not rest.strip("/") and scheme != "file":
        raise ConfigError(f"a URL that names no store; say which, such as {scheme}://bucket/x.zarr")
    if mark and scheme != "file":
        return mirrors() / scheme / rest.strip("/")
    return Path(rest if mark else location).expanduser()


def path_of_text(value: Any) -> Any:
    """For settings: text, which may be a URL, as a path; anything else as it is."""
    return local_path(refuse_empty(value)) if isinstance(value, str) else value


def refuse_empty(value: Any) -> Any:
    """`value`, unless it is the empty text that an unset variable of a script leaves: it would be this folder.

    Raises:
        ValueError: it is that.
    """
    if value == "":
        raise ValueError("empty, where a path is needed; a dot is this folder")
    return value


def refuse_url(path: Path) -> Path:
    """`path`, unless it is the mirror of a URL.

    Raises:
        ValueError: it is.
    """
    if url_of(path) is not None:
        raise ValueError("a URL, where a folder of this machine is needed")
    return path


Location = Annotated[Path, BeforeValidator(path_of_text)]
LocalPath = Annotated[Location, AfterValidator(refuse_url)]


def url_of(path: Path) -> str | None:
    """The URL whose mirror `path` is, or None for a folder."""
    if not path.absolute().is_relative_to(mirrors()):
        return None
    scheme, *rest = path.absolute().relative_to(mirrors()).parts
    return f"{scheme}://{'/'.join(rest)}"


def place_at(path: Path) -> Folder | Bucket:
    """The files of the store at `path`."""
    url = url_of(path)
    return Folder(path) if url is None else Bucket(path, url)


@final
class Folder:
    """A store in a folder. Names are relative to it.

    Attributes:
        few: small files that are read and checked one after another (30 µs each) while dask begins (.2 s).
    """

    few = 4096

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None when it is not there."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes | memoryview) -> None:
        write_file(self.path / name, data)

    def stage(self, name: str, data: bytes | memoryview, by: str) -> str:
        """Make the bytes safe under another name, which is returned; see `common.files.write_aside`."""
        return write_aside(self.path / name, data, by).relative_to(self.path).as_posix()

    def publish(self, aside: str, name: str) -> None:
        """Give what was staged its name."""
        put_in_place(self.path / aside, self.path / name)

    def discard(self, aside: str) -> None:
        (self.path / aside).unlink(missing_ok=True)

    def local(self, name: str, crc: str) -> Path:
        """The file, to be mapped."""
        return self.path / name

    def leftovers(self) -> list[Path]:
        """Files aside that a kill left behind."""
        return sorted(self.path.rglob(f"*{ASIDE}"))

    def names(self) -> set[str]:
        """What lies at the top."""
        return {file.name for file in self.path.iterdir()}

    def remove(self) -> None:
        shutil.rmtree(self.path)


@final
class Bucket:
    """A store in an object store, through fsspec; `path` is its mirror.

    Attributes:
        few: objects that are fetched one after another (30 ms each and more) while dask begins.

    Raises:
        ConfigError: no package for this kind of URL.
        StoreError: any call, when the object store does not do what it is asked.
    """

    few = 8

    def __init__(self, path: Path, url: str) -> None:
        import fsspec

        self.path, self.url = path, url
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"{url}: {str(error).rstrip('.')}.") from None
        self.sizes: dict[str, int] | None = None
        self.checked: set[str] = set()

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self.error(name, error) from None

    def size(self, name: str) -> int | None:
        if self.sizes is None:  # one listing, where a store of ten thousand chunks would take as many requests
            self.sizes = self.listing()
        return self.sizes.get(name)

    def listing(self, under: str = "") -> dict[str, int]:
        """Names and sizes of all objects under a prefix."""
        try:
            found = self.fs.find(f"{self.root}/{under}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self.error(under, error) from None
        prefix = self.root.rstrip("/") + "/"
        return {name.removeprefix(prefix): int(info["size"]) for name, info in found.items()}

    def write(self, name: str, data: bytes | memoryview) -> None:
        try:
            self.fs.pipe_file(f"{self.root}/{name}", bytes(data))
        except Exception as error:
            raise self.error(name, error) from None
        self.checked.discard(name)
        if self.sizes is not None:
            self.sizes[name] = len(data)

    def stage(self, name: str, data: bytes | memoryview, by: str) -> str:
        """Under its final name at once: nothing counts before the journal has it, and equal chunks have equal bytes."""
        self.write(name, data)
        return name

    def publish(self, aside: str, name: str) -> None:
        if self.sizes is not None and name not in self.sizes:  # another process wrote it
            try:
                self.sizes[name] = int(self.fs.size(f"{self.root}/{name}"))
            except Exception as error:
                raise self.error(name, error) from None
        self.checked.discard(name)

    def discard(self, aside: str) -> None:
        """Nothing: what is not in the journal does not exist, and is written again."""

    def local(self, name: str, crc: str) -> Path:
        """The object in the mirror, downloaded unless it is there with this checksum."""
        file = self.path / name
        if name in self.checked:
            return file
        if not file.exists() or crc32c(file.read_bytes()) != crc:
            data = self.read(name)
            if data is None:
                raise StoreError(f"{self.url}/{name}: no such object. Run: harvest verify {self.url} --repair")
            write_file(file, data, by=f".{uuid.uuid4().hex[:8]}")  # the ranks of a run fetch it at once
        self.checked.add(name)
        return file

    def leftovers(self) -> list[Path]:
        return []

    def names(self) -> set[str]:
        return {name.split("/")[0] for name in self.listing()}

    def remove(self) -> None:
        for name in self.listing():
            self.forget(name)
        shutil.rmtree(self.path, ignore_errors=True)

    def forget(self, name: str) -> None:
        """Remove one object."""
        try:
            self.fs.rm_file(f"{self.root}/{name}")
        except FileNotFoundError:
            pass
        except Exception as error:
            raise self.error(name, error) from None

    def error(self, name: str, error: Exception) -> StoreError:
        lines = str(error).splitlines()
        return StoreError(
            f"{self.url}/{name}: {type(error).__name__}: {lines[0][:200] if lines else 'no reason given'}"
        )
