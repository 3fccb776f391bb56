"""A Hub in a folder: its client copies files."""

import shutil
from pathlib import Path

try:
    import httpx2
except ImportError:  # huggingface_hub 1
    import httpx as httpx2
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects


class FakeHub:
    """Stands in for `HfApi`; repositories are folders below `root`, and `downloads` lists the copied files."""

    def __init__(self, root: Path) -> None:
        self.root, self.downloads = root, []

    def __call__(self):
        return self

    def list_repo_files(self, repo_id):
        folder = self.root / repo_id
        if not folder.is_dir():
            raise RepositoryNotFoundError("404", response=httpx2.Response(404, request=httpx2.Request("GET", "x:")))
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def create_repo(self, repo_id, private=False, exist_ok=False):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, delete_patterns=(), commit_message=None):
        for name in filter_repo_objects(self.list_repo_files(repo_id), allow_patterns=list(delete_patterns) or ["-"]):
            (self.root / repo_id / name).unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, allow_patterns):
        target = self.root / "cache" / repo_id
        for name in filter_repo_objects(self.list_repo_files(repo_id), allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / repo_id / name, target / name)
            self.downloads.append(name)
        return str(target)
