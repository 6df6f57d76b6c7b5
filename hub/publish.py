"""`hydrahead push`: a student's folder on the Hub, whole, checked, and loaded from there before it gets its tag."""

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..console import first_line
from ..loading import check_checkpoint, load_tokenizer
from .card import CARD, card_of, is_edited, state, write_card
from .checkpoint import CODE, check_code, run_clean_process
from .facts import Facts
from .folder import check_student
from .metadata import is_hub_id

PROMPT = "A few heads keep full attention; all others keep a state of constant size, whatever they read. So the model"
# What hydrahead, transformers' tokenizers and a teacher's terms put into a folder, and nothing else.
ALLOWED = re.compile(
    r"(configuration|kernels|modeling|ops)_hydrahead\.py"
    r"|(config|generation_config|head_masks|made_from|card|report|training)\.json|(README|heads|report)\.md|report\.html"
    r"|(head_map|knockout_[a-z]+|accuracy|depths)\.png"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|processor_config)\.json|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)|additional_chat_templates/\w+\.jinja"
    r"|(LICENSE|NOTICE|USE_POLICY)(\.md|\.txt)?|\.gitattributes"
)
IGNORED = (".git/", ".cache/huggingface/")  # what git and downloads keep in a folder; the library leaves it, too
BY_STATUS = {
    401: "the Hub does not know your token (401): `hf auth login`, or HF_TOKEN with one that may write",
    403: "your token may not write there (403): choose a name of your own, or take a token with the right to write",
    404: "there is no such repository or revision, or your token may not see it (404)",
    409: "it was changed meanwhile (409): run the same command again",
    429: "the Hub asks to wait (429): run the same command again later",
}
# What a request ends with: the library's error has the bases of whatever its release sends requests with.
ERRORS = HfHubHTTPError.__bases__
_COMPARE = """
import torch
folder, repository, revision = sys.argv[1:]
prompt, found = sys.stdin.read(), []
for name, options in ((folder, {}), (repository, {"revision": revision})):
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, **options)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    with torch.no_grad():
        found.append((ids, model(ids).logits.float()))
    del model
(ids, here), (_, there) = found
same = ids.equal(found[1][0]) and here.equal(there)
print(json.dumps({"tokens": ids.shape[1], "same": same}))
"""


def publish(
    folder: Path,
    repository: str,
    private: bool = False,
    tag: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], object] = print,
) -> None:
    """
    Put a student's folder on the Hub: list it, upload it, verify checksums, load it from the returned commit in a
    fresh process and compare its logits with the folder's, and give that commit a tag. What was interrupted goes on
    with the same call.

    The folder's card is written anew with the repository's name and tag, unless somebody edited it.

    Args:
        repository: `OWNER/NAME`; made where it is not there yet.
        private: so that only its owner sees it, where it is made.
        tag: such as `v1`; of the commit that was checked.
        dry_run: list what would be uploaded, and stop; nothing is written or sent.
        say: told what was done, line by line.

    Raises:
        ValueError: nothing may be sent: no student, a file of another kind, no licence, other code; or the Hub
            refused, or did not get what the folder holds. One line, without the token.
    """
    if not is_hub_id(repository):
        raise ValueError(f"{repository}: expected OWNER/NAME, a repository on the Hub")
    if tag is not None and not re.fullmatch(r"\w[\w.\-]*", tag):
        raise ValueError(f"tag {tag!r}: expected letters, digits, dots and dashes, such as v1")
    files = check_folder(folder)
    for name, size in files.items():
        say(f"{size:>15,}  {name}")
    say(f"{sum(files.values()):>15,}  bytes in {len(files)} files, to {repository}" + (f", tag {tag}" if tag else ""))
    if dry_run:
        return
    check_access(repository)
    api = HfApi()
    with one_line(repository):
        commit = tagged = tagged_commit(api, repository, tag) if tag else None
        if tagged is None:
            make_repository(api, repository, private)
    if is_edited(folder):
        say(f"{CARD} was edited: it goes as it is")
    else:  # now that there is what the card names
        state(folder, repository=repository, revision=tag or "main")
        write_card(folder)
        files = check_folder(folder)
    with one_line(repository):
        ModelCard.load(folder / CARD).validate()
        if commit is None:
            commit = upload(api, folder, list(files), repository)
            say(f"uploaded: {commit}")
        left = verify(api, folder, repository, commit, tag if tagged else None)
        say(f"checksums of {len(files)} files agree" + (f"; was there before: {', '.join(left)}" if left else ""))
        tokens = reload(folder, repository, commit)
        say(f"loaded from {commit[:12]} without hydrahead: the folder's logits, bit for bit, for {tokens} tokens")
        if tag and not tagged:
            api.create_tag(repository, tag=tag, revision=commit)
    say(f"{constants.ENDPOINT}/{repository}/tree/{tag or commit}")


def check_folder(folder: Path) -> dict[str, int]:
    """
    What of a folder is published: names and bytes of its files.

    Raises:
        ValueError: it is no student's, or holds what does not belong there, or has no card, licence or tokenizer, or
            its weights are not whole, or its code is not this package's; one line.
    """
    check_student(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    paths = {name: path for name, path in paths.items() if not name.startswith(IGNORED)}
    for name, path in paths.items():
        if path.is_symlink():
            raise ValueError(f"{path}: a link, and what it leads to would be published: put a copy in its place")
        if not ALLOWED.fullmatch(name):
            raise ValueError(f"{path}: not part of a student; move it out of the folder")
    for name in (CARD, *CODE, "tokenizer_config.json"):
        if name not in paths:
            raise ValueError(f"{folder}: has no {name}, which whoever loads it needs")
    check_weights(folder, {name for name in paths if name.endswith(".safetensors")})
    check_code(folder)  # which is run by everyone who loads it
    config = Facts.read(folder).config
    load_tokenizer(folder, config)
    check_checkpoint(folder, config)
    check_licence(folder)
    return {name: path.stat().st_size for name, path in paths.items()}


def check_weights(folder: Path, found: set[str]) -> None:
    """
    Raises:
        ValueError: a file of the weights is missing, or one that is there is none of them.
    """
    index = folder / "model.safetensors.index.json"
    parts = {"model.safetensors"}
    if index.is_file():
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: does not say which file holds which weights; save the student again") from None
    if missing := sorted(parts - found):
        raise ValueError(f"{folder}: has no {missing[0]}, a part of its weights")
    if more := sorted(found - parts):
        raise ValueError(f"{folder / more[0]}: not part of its weights; move it out of the folder")


def check_licence(folder: Path) -> None:
    """
    Raises:
        ValueError: the card's metadata cannot be read, or states no licence.
    """
    text = (folder / CARD).read_text(encoding="utf-8") if is_edited(folder) else card_of(folder)
    try:
        data = ModelCard(text).data
    except Exception as error:  # YAML's errors are of several lines and kinds
        raise ValueError(f"{folder / CARD}: its metadata cannot be read ({str(error).splitlines()[0]})") from None
    if not data.license:
        raise ValueError(
            f"{folder}: the teacher's licence is not known: state one that it allows, "
            f"hydrahead card {folder} --license apache-2.0"
        )


def check_access(repository: str) -> None:
    """
    Raises:
        ValueError: nothing can be sent from here.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{repository}: HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise ValueError(f"{repository}: there is no token: `hf auth login`, or HF_TOKEN with one that may write")


def tagged_commit(api: HfApi, repository: str, tag: str) -> str | None:
    """The commit that a tag stands for; `None` where there is no such tag yet."""
    try:
        refs = api.list_repo_refs(repository)
    except RepositoryNotFoundError:
        return None
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def make_repository(api: HfApi, repository: str, private: bool) -> None:
    """
    Make a repository where it is not there yet.

    Raises:
        ValueError: it is to be private, and is there and public.
    """
    api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.repo_info(repository).private:
        raise ValueError(f"{repository}: is there and public; make it private on the Hub, or choose another name")


def upload(api: HfApi, folder: Path, files: list[str], repository: str) -> str:
    """Upload what a repository has not got of some files; gives the commit that holds all of them."""
    message = f"Upload {len(files)} files with hydrahead push"
    info = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, commit_message=message)
    return info.oid


def verify(api: HfApi, folder: Path, repository: str, commit: str, tag: str | None = None) -> list[str]:
    """
    Compare the checksums of a folder's files with those of a commit.

    Args:
        tag: that the commit has already.

    Returns:
        files of the commit that the folder has not got.

    Raises:
        ValueError: a file is missing there, or another one.
    """
    found = api.verify_repo_checksums(repository, revision=commit, local_dir=folder)
    wrong = [*(each["path"] for each in found.mismatches), *found.extra_paths]
    if wrong and tag:
        raise ValueError(f"{repository}: its tag {tag} stands for another {wrong[0]}; choose another tag")
    if wrong:
        raise ValueError(
            f"{repository}: {wrong[0]} is not there as it is in {folder} (commit {commit[:12]}); run the same command "
            "again, and leave the folder alone meanwhile"
        )
    return [name for name in found.missing_paths if name != ".gitattributes"]


def reload(folder: Path, repository: str, commit: str) -> int:
    """
    Load the folder and the commit in a fresh process that cannot import hydrahead, the commit without anything that
    was downloaded before, and compare their logits for `PROMPT`.

    Returns:
        the number of tokens compared.

    Raises:
        ValueError: one of them does not load, or logits differ.
    """
    with tempfile.TemporaryDirectory(prefix="hydrahead-push-") as cache:
        here = {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": f"{cache}/hub", "HF_MODULES_CACHE": f"{cache}/modules"}
        arguments = [str(folder.absolute()), repository, commit]
        try:
            result = run_clean_process(_COMPARE, arguments, PROMPT, here, f"{repository} at {commit[:12]}")
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    if not result["same"]:
        raise ValueError(f"{repository}: commit {commit[:12]} gives other logits than {folder}; it gets no tag")
    return result["tokens"]


@contextlib.contextmanager
def one_line(repository: str) -> Iterator[None]:
    """Have whatever the Hub and the way there say end in one line that says what to do, and never holds the token."""
    try:
        yield
    except (*ERRORS, ValueError, RuntimeError) as error:
        chain: list[BaseException] = [error]
        while (last := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(last)
        is_safe = all(_without_token(str(each)) == str(each) for each in chain)
        line = _without_token(_in_words(repository, chain))
        raise ValueError(line) from (error if is_safe else None)


def _in_words(repository: str, chain: list[BaseException]) -> str:
    """What went wrong, from an error and those that it comes from."""
    error, status, said = chain[0], None, None
    for each in chain:
        if isinstance(each, HfHubHTTPError):
            status, said = each.response.status_code, each.server_message
        elif of_storage := re.search(r"HTTP status client error \((\d{3}) ", str(each)):  # says so in words only
            status = int(of_storage[1])
    if status in BY_STATUS:
        return f"{repository}: {BY_STATUS[status]}"
    if status is not None and status < 500:
        return f"{repository}: the Hub refused it ({status}): {' '.join((said or str(error)).split())}"
    if type(error) is ValueError and status is None:
        return first_line(error)
    reason = f"status {status}" if status else first_line(error)
    return f"{repository}: the upload was interrupted ({reason}); the same command goes on where it stopped"


def _without_token(text: str) -> str:
    """A text in which no token can be read."""
    if token := get_token():
        text = text.replace(token, "(token)")
    return re.sub(r"\bhf_\w{8,}", "(token)", text)
