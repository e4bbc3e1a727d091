"""Check the subjects of commits: ``python -m tests.support.commits``, or with a file that holds one message.

Without an argument it reads every commit after :data:`BASE`, merges excepted. A clone that lacks the base, as a shallow one does,
is not checked, and says so loudly.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["BASE", "check_history", "check_message", "faults"]

ROOT = Path(__file__).resolve().parents[2]

#: The last commit that was made before this check.
BASE = "00a9f487b88abd3f15f11a12e6f2d8eddc7bf545"

LONGEST = 72

#: What git writes itself, and takes apart again before anything is handed in.
_FOR_REBASE = ("fixup! ", "squash! ", "amend! ")

#: First words that cannot be a verb in the imperative.
_NO_VERB = re.compile(
    r"""a|an|the|this|that|these|those|there|its?|i|we|you|they|he|she|what|when|where|which|who|how|whether|why|nothing
    |no|some|all|each|every|both|any|many|more|most|was|were|is|are|has|had|does|did|done|been|made|wrote|ran|sent|took
    |kept|left|held|found|gave|went|said|told|got|began|broke|chose|came|saw|became|lost|bought|brought|meant""",
    re.VERBOSE,
)

#: Verbs that only look like a gerund, a past tense or a third person.
_A_VERB = re.compile(
    r"""bring|cling|fling|ping|ring|sing|spring|sting|string|swing|wing
    |bleed|breed|embed|exceed|feed|heed|need|proceed|seed|shed|shred|speed|succeed|weed
    |\w*ss|\w*us|bias|always""",
    re.VERBOSE,
)


def faults(subject: str) -> list[str]:
    """Say what is wrong with a subject; nothing if it is sound."""
    if subject.startswith('Revert "'):
        return []
    found = []
    if len(subject) > LONGEST:
        found.append(f"has {len(subject)} characters, and {LONGEST} are the most")
    if subject.endswith("."):
        found.append("ends with a full stop")
    if not subject[:1].isupper():
        found.append("does not start with a capital letter")
    # "Docs: say what a batch is" names a part first.
    part = re.match(r"[\w./-]+: +", subject)
    words = re.match(r"[A-Za-z']+", subject[part.end() if part else 0 :])
    fault = _not_imperative(words.group().lower()) if words else None
    return [*found, fault] if fault else found


def _not_imperative(word: str) -> str | None:
    if _NO_VERB.fullmatch(word):
        return f'starts with "{word}" instead of a verb in the imperative'
    if _A_VERB.fullmatch(word):
        return None
    for ending, wrong in (("ing", "Fixing"), ("ed", "Fixed"), ("s", "Fixes")):
        if word.endswith(ending):
            return f'starts with "{word}": say what the commit does, as in "Fix", not "{wrong}"'
    return None


def check_message(message: str) -> list[str]:
    """Check a message as git hands it to a ``commit-msg`` hook."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    while lines and not lines[0].strip():
        del lines[0]
    if not lines:
        return []  # git refuses it
    if lines[0].startswith((*_FOR_REBASE, "Merge ")):
        return []
    found = faults(lines[0].rstrip())
    if len(lines) > 1 and lines[1].strip():
        found.append("has no blank line after it")
    return [f"{lines[0]}\n    {fault}" for fault in found]


def check_history(repository: Path, base: str) -> list[str] | None:
    """Check the commits after a base; ``None`` if the clone does not reach back to it."""
    if _git(repository, "cat-file", "-e", f"{base}^{{commit}}") is None:
        return None
    listed = _git(repository, "log", "--no-merges", "--format=%h %s", f"{base}..HEAD")
    if listed is None:
        return None
    commits = [line.partition(" ") for line in listed.splitlines()]
    return [f"{commit} {subject}\n    {fault}" for commit, _, subject in commits for fault in faults(subject)]


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments], check=False, capture_output=True, text=True, encoding="utf-8"
        )
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout


def main(arguments: list[str]) -> int:
    """Check the history, or the message in the file that is named."""
    if arguments:
        found = check_message(Path(arguments[0]).read_text(encoding="utf-8"))
    else:
        history = check_history(ROOT, BASE)
        if history is None:
            print("!" * 100, file=sys.stderr)
            print(f"! COMMIT SUBJECTS NOT CHECKED: this clone has no commit {BASE[:12]}.", file=sys.stderr)
            print("! For a check: git fetch --unshallow", file=sys.stderr)
            print("!" * 100, file=sys.stderr)
            return 0
        found = history
    for fault in found:
        print(fault, file=sys.stderr)
    if found:
        print(
            f"The subject of a commit is imperative, has at most {LONGEST} characters and no full stop. Its body says why.",
            file=sys.stderr,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
