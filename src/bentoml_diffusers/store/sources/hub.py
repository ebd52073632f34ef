"""From a hub repository to a local folder with just the files that a pipeline needs."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bentoml_diffusers.errors import DiffusersError, HubUnavailable, InvalidModel, ModelNotFound
from bentoml_diffusers.store.entries import MODULAR_INDEX, PIPELINE_INDEX, storage_errors
from bentoml_diffusers.store.sources.selection import check_name, select_files
from bentoml_diffusers.store.sources.source import Wanted, list_names, read_classic_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

logger = logging.getLogger(__name__)

_PROBE_S = 5.0


@dataclass(frozen=True)
class Download:
    """A downloaded snapshot: its folder, and the commit that the revision pointed to."""

    folder: Path
    commit: str


def find_index(wanted: Wanted) -> Path:
    """Downloads the index of a pipeline: the classic one if there are both, or the modular one.

    Offline, or without network, finds what the hub's cache holds.

    Raises:
        ModelNotFound: 404, there is no such repository or revision, or it needs a token.
        InvalidModel: 400, no diffusers pipeline.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    names = [PIPELINE_INDEX, MODULAR_INDEX]
    first, second = reversed(names) if wanted.modular else names
    with _hub_errors(wanted.source, wanted.revision), _use_proxies(wanted.proxies):
        is_cut_off = _is_cut_off()
        # By the revision's name, so that the cache can resolve it offline next time.
        download = functools.partial(
            hf_hub_download, wanted.source, revision=wanted.revision, local_files_only=is_cut_off
        )
        try:
            return Path(download(first))
        except EntryNotFoundError as err:
            try:
                return Path(download(second))
            except EntryNotFoundError:
                raise err from None


def download_snapshot(
    repo_id: str,
    choose: Callable[[Sequence[str]], Iterable[str]],
    *,
    revision: str,
    proxies: Mapping[str, str] | None = None,
) -> Download:
    """Downloads the files of a repository that ``choose`` selects by their names.

    Offline, or without network, ``choose`` selects among the files in the hub's cache.

    Raises:
        ModelNotFound: 404, there is no such repository or revision, or it needs a token.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
        StorageFull: 507, no space left for the files.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo_id, revision), _use_proxies(proxies):
        names = _list_files(repo_id, revision)
        if names is None:
            # Only the folder: the hub's client would miss the files that were not asked for.
            folder = Path(
                snapshot_download(
                    repo_id, revision=revision, allow_patterns=[], local_files_only=True
                )
            )
            choose(list_names(folder))
        else:
            patterns = [_as_pattern(name) for name in choose(names)]
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    return Download(folder, folder.name)  # a snapshot lies in `snapshots/<commit>/`


def download_pipeline(wanted: Wanted, index: Path) -> Download:
    """Downloads the files that a classic pipeline's index names.

    Offline, or without network, takes what the hub's cache holds.

    Args:
        wanted: The repository. A file named by its ``custom_pipeline`` is taken too, if it exists.
        index: Its index, see :func:`find_index`.

    Raises:
        ModelNotFound: 404, there is no such repository or revision, or it needs a token.
        InvalidModel: 400, no diffusers pipeline, or no such variant.
        UntrustedSource: 400, only pickled weights.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
        StorageFull: 507, no space left for the files.
    """
    from huggingface_hub import snapshot_download

    commit = index.parent.name  # a snapshot lies in `snapshots/<commit>/`
    repo_id, code_file = wanted.source, f"{wanted.custom_pipeline}.py"
    with _hub_errors(repo_id, commit), _use_proxies(wanted.proxies):
        names = _list_files(repo_id, commit)
        if names is None:
            return Download(folder=index.parent, commit=commit)
        found = read_classic_index(index.parent, repo_id)
        selection = select_files(found, names, source=repo_id, weights=wanted.weights)
        taken = [*selection.files, *(name for name in names if name == code_file)]
        folder = snapshot_download(
            repo_id, revision=commit, allow_patterns=[_as_pattern(name) for name in taken]
        )
    return Download(folder=Path(folder), commit=commit)


def download_file(
    repo_id: str,
    name: str,
    *,
    revision: str = "main",
    repo_type: str | None = None,
    token: str | None = None,
) -> Path:
    """Downloads one file, or finds it in the hub's cache.

    Raises:
        ModelNotFound: 404, no such repository.
        InvalidModel: 400, no such file in it.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    from huggingface_hub import hf_hub_download

    check_name(repo_id, name)
    with _hub_errors(repo_id, revision, name):
        return Path(
            hf_hub_download(
                repo_id,
                name,
                revision=revision,
                repo_type=repo_type,
                token=token,
                local_files_only=_is_cut_off(),
            )
        )


def upload_files(
    repo_id: str,
    files: Mapping[str, bytes],
    *,
    token: str | None = None,
    private: bool | None = None,
    message: str,
) -> str:
    """Uploads files in one commit; creates the repository if it does not exist.

    Args:
        repo_id: ``owner/name``, or ``name`` in the user's own namespace.
        files: Files by their path in the repository.
        token: By default that of the hub's login or HF_TOKEN.
        private: Whether a new repository is private.
        message: Commit message.

    Returns:
        The full id of the repository.

    Raises:
        ModelNotFound: 404, no such repository, or the token may not write to it.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    with _hub_errors(repo_id, "main"):
        try:
            found = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            added = [CommitOperationAdd(name, data) for name, data in files.items()]
            api.create_commit(found, added, commit_message=message)
        except HfHubHTTPError as err:
            if err.response.status_code not in (401, 403):
                raise
            raise ModelNotFound(
                repo_id,
                "may not be written to with this token",
                "give a token with write access to it",
            ) from err
    return str(found)


def list_repository(repo_id: str, revision: str = "main") -> Sequence[str]:
    """Returns all files of a repository, or offline those in the hub's cache.

    Raises:
        ModelNotFound: 404, no such repository, or it needs a token.
        HubUnavailable: 503, the hub could not be reached, or answered with an error.
    """
    with _hub_errors(repo_id, revision):
        return _list_files(repo_id, revision) or ()


def _list_files(repo_id: str, revision: str) -> list[str] | None:
    """All files of a repository; ``None`` offline."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo_id, revision=revision)
    except Exception as err:
        if not _is_unreachable(err):
            raise
        logger.warning("the hub cannot be reached, using its cache: %s", err)
        return None
    return [item.rfilename for item in info.siblings or ()]


def _is_cut_off() -> bool:
    """True if two requests find no network: the hub's client would try each file for 23 seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False  # the hub's client handles this, with a message of its own
    for _ in range(2):
        try:
            get_session().head(constants.ENDPOINT, timeout=_PROBE_S)
        except Exception as err:  # noqa: BLE001, PERF203 - from httpx or requests, depending on its version
            if not _is_unreachable(err):
                return False
        else:
            return False
    return True


def _as_pattern(name: str) -> str:
    """An ``fnmatch`` pattern that matches only this name."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextlib.contextmanager
def _use_proxies(proxies: Mapping[str, str] | None) -> Iterator[None]:
    """Sets proxies in the environment, since the hub's client takes none as arguments.

    Not thread-safe: during the block all requests of the process use them.
    """
    if not proxies:
        yield
        return
    from huggingface_hub import close_session

    names = {f"{scheme.upper()}_PROXY": url for scheme, url in proxies.items()}
    names |= {name.lower(): url for name, url in names.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    close_session()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        close_session()


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str, file: str = PIPELINE_INDEX) -> Iterator[None]:
    """Turns errors of huggingface_hub into this package's, with the next step."""
    try:
        with storage_errors(repo_id):
            yield
    except DiffusersError:
        raise
    except Exception as err:
        error = _translate(err, repo_id, revision, file)
        if error is None:
            raise
        raise error from err


def _translate(err: Exception, repo_id: str, revision: str, file: str) -> DiffusersError | None:
    from huggingface_hub import errors

    if isinstance(err, errors.HFValidationError):
        return ModelNotFound(repo_id, "is neither a folder nor a repository id", "check the path")
    if isinstance(err, errors.GatedRepoError):
        return ModelNotFound(repo_id, "is gated", "accept its licence on the hub and set HF_TOKEN")
    if isinstance(err, errors.RevisionNotFoundError):
        return ModelNotFound(
            repo_id, f"has no revision {revision!r}", "check the name of the revision"
        )
    if isinstance(err, errors.RepositoryNotFoundError):
        return ModelNotFound(
            repo_id,
            "was not found on the hub, or is private",
            "check the name; if it is private, set HF_TOKEN to a token that may read it",
        )
    if isinstance(err, errors.LocalEntryNotFoundError) and not _has_answer(err.__cause__):
        return ModelNotFound(
            repo_id,
            f"is not a folder here, and {file} is not in the hub's cache",
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        )
    if isinstance(err, errors.LocalEntryNotFoundError):
        return HubUnavailable(repo_id, _describe(err.__cause__))
    if isinstance(err, errors.EntryNotFoundError):
        what = "holds no diffusers pipeline: it " if file == PIPELINE_INDEX else ""
        return InvalidModel(repo_id, f"{what}has no {file}", "check its name and the revision")
    return HubUnavailable(repo_id, _describe(err)) if _is_of_the_network(err) else None


def _has_answer(err: Any) -> bool:
    return getattr(err, "response", None) is not None or type(err).__name__ == "FileMetadataError"


def _is_of_the_network(err: Exception) -> bool:
    # huggingface_hub uses httpx or httpx2, depending on its version.
    return isinstance(err, OSError) or type(err).__module__.partition(".")[0] in ("httpx", "httpx2")


def _is_unreachable(err: Exception) -> bool:
    names = {cls.__name__ for cls in type(err).__mro__}
    return bool(names & {"ConnectionError", "NetworkError", "TimeoutException", "ProxyError"})


def _describe(err: Any) -> str:
    status = getattr(getattr(err, "response", None), "status_code", None)
    if status == 401:
        return "401, the token in HF_TOKEN is not valid"
    if status == 429:
        return "429, too many requests; wait, or set HF_TOKEN for a higher limit"
    if status is not None:
        return f"status {status}"
    return f"{type(err).__name__}: {err}"
