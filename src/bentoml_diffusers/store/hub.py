"""From a Hub repository to a local folder with just the files that a pipeline needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bentoml_diffusers.errors import DiffusersError, InvalidModel, ModelNotFound
from bentoml_diffusers.store.layout import PIPELINE_INDEX

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Download:
    """A downloaded snapshot: its folder, and the commit that the revision stood for."""

    folder: Path
    commit: str


def download_pipeline(
    repo_id: str, *, revision: str, variant: str | None, proxies: Mapping[str, str] | None
) -> Download:
    """Downloads the files that the pipeline's index names, after asking that there is one.

    Raises:
        ModelNotFound: 404, there is no such repository, revision or variant.
        InvalidModel: 400, the repository holds no diffusers pipeline.
        DiffusersError: 500, the hub did not answer as it should.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        index = hf_hub_download(repo_id, PIPELINE_INDEX, revision=revision)
        folder = DiffusionPipeline.download(
            repo_id,
            revision=revision,
            variant=variant,
            proxies=dict(proxies) if proxies else None,
            use_safetensors=True,
        )
    except HFValidationError as err:
        raise ModelNotFound(
            repo_id, "is neither a folder nor a repository id", "check the path"
        ) from err
    except GatedRepoError as err:
        raise ModelNotFound(
            repo_id, "is gated", "accept its licence on the hub and set HF_TOKEN"
        ) from err
    except (RepositoryNotFoundError, RevisionNotFoundError) as err:
        raise ModelNotFound(
            repo_id, f"was not found on the hub at revision {revision!r}", "check both names"
        ) from err
    except LocalEntryNotFoundError as err:
        raise ModelNotFound(
            repo_id, "is not a folder here, and the hub could not be reached", "check the network"
        ) from err
    except EntryNotFoundError as err:
        raise InvalidModel(
            repo_id, f"holds no diffusers pipeline: it has no {PIPELINE_INDEX}"
        ) from err
    except HfHubHTTPError as err:
        raise DiffusersError(f"the hub refused {repo_id!r}: {err}") from err
    except (OSError, ValueError) as err:
        raise ModelNotFound(
            repo_id, f"could not be downloaded (variant {variant!r}): {err}"
        ) from err
    # A snapshot lies in `snapshots/<commit>/` of the hub's cache.
    return Download(folder=Path(folder), commit=Path(index).parent.name)
