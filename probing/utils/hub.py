"""The Hugging Face Hub: downloads, and errors of its client in one line."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError

from probing.utils.errors import UserError, first_line


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns errors of the Hub's client into one line."""
    try:
        yield
    except HFValidationError:
        raise UserError(f"{repo!r} is no repository name; write USER/NAME, or ./NAME for a folder") from None
    except RepositoryNotFoundError:
        raise UserError(f"no repository {repo} on the Hub; check its name, or log in with: hf auth login") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # an upload raises the last two
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
            raise UserError("no valid Hub token; log in with: hf auth login, or set HF_TOKEN") from None
        if type(error) is ValueError:  # several lines about the model card
            raise UserError(f"{repo}: the Hub refuses ({' '.join(str(error).split())[:200]}); correct that") from None
        reason = first_line(error.__cause__ or error)
        raise UserError(f"{repo}: the Hub fails ({reason}); check network and token") from None


def download(repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Returns a folder with the files of a repository that match the patterns.

    Raises:
        UserError: there is no such repository, or the Hub is out of reach.
    """
    with hub_errors(repo):
        return Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
