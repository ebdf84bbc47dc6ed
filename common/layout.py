"""What lies where in a store, as a function of its header: the arrays, their shapes, the zarr metadata."""

from __future__ import annotations

from typing import Any

from common.arrays import ArraySpec

FORMAT = 1
HEADER = "granary"
TOKENS, DOCUMENTS = "tokens", "documents"
SUMMARY = ("count", "mean", "second_moment", "mean_squared_norm", "max_abs")
PADDING = -1  # in `documents`: nothing may be trained on here


def acts_array(hook: str) -> str:
    return f"acts/{hook}"


def norms_array(hook: str) -> str:
    return f"norms/{hook}"


def token_scales_array(hook: str) -> str:
    return f"token_scales/{hook}"


def partial_array(hook: str) -> str:
    return f"moments/{hook}/partial"


def summary_array(hook: str, name: str) -> str:
    return f"moments/{hook}/{name}"


def chunk_arrays(header: dict[str, Any], hook: str) -> list[str]:
    """The arrays that every chunk has at a hook; committed together."""
    scales = [token_scales_array(hook)] if header["hooks"][hook]["dtype"] == "int8" else []
    return [acts_array(hook), norms_array(hook), *scales, partial_array(hook)]


def array_names(header: dict[str, Any]) -> list[str]:
    """Paths of all arrays, the summaries only where they exist."""
    names = [TOKENS, DOCUMENTS]
    for hook, info in header["hooks"].items():
        names += chunk_arrays(header, hook)
        if info["summarised"]:
            names += [summary_array(hook, name) for name in SUMMARY]
    return names


def array_spec(header: dict[str, Any], array: str) -> ArraySpec:
    """Shape, type and chunks of one array."""
    identity, n_sequences = header["identity"], int(header["n_sequences"])
    rows, chunk = (n_sequences, int(identity["context"])), int(identity["chunk_sequences"])
    axes = ("sequence", "position")
    if array in (TOKENS, DOCUMENTS):
        return ArraySpec(rows, chunk, "int32", dimensions=axes)
    kind, _, rest = array.partition("/")
    if kind in ("norms", "token_scales"):
        return ArraySpec(rows, chunk, "float32", dimensions=axes)
    if kind == "acts":
        info = header["hooks"][rest]
        shape = (*rows, int(info["d_model"]))
        return ArraySpec(shape, chunk, info["dtype"], identity["compression"], (*axes, "dimension"))
    hook, _, name = rest.rpartition("/")
    d_model = int(header["hooks"][hook]["d_model"])
    if name == "partial":
        shape = (-(-n_sequences // chunk), 2, d_model)
        return ArraySpec(shape, 1, "float64", dimensions=("chunk", "sum", "dimension"))
    size = d_model if name in ("mean", "second_moment") else 1
    return ArraySpec((size,), size, "float64", dimensions=("dimension",))


def nodes(header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `zarr.json` of every array and group below the root, by path."""
    found = {name: array_spec(header, name).metadata() for name in array_names(header)}
    hooks = header["hooks"]
    groups = ["acts", "norms", "moments", *(f"moments/{hook}" for hook in hooks)] if hooks else []
    groups += ["token_scales"] if any(info["dtype"] == "int8" for info in hooks.values()) else []
    return found | {group: group_metadata({}) for group in groups}


def root(header: dict[str, Any]) -> dict[str, Any]:
    """The root's `zarr.json`: the header, and the metadata of all nodes.

    Consolidated: readers list the arrays without walking the folder, where the journal is no zarr node.
    Sorted: zarr-python takes siblings that do not lie together for several groups, and keeps the last one.
    """
    consolidated = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(nodes(header).items()))}
    return group_metadata({HEADER: header}) | {"consolidated_metadata": consolidated}


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}
