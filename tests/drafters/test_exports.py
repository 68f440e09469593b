"""`rasd_integrations.drafters` has every drafter, and imports none before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rasd_integrations import RASD, drafters
from rasd_integrations.drafters.base import Drafter, Needs, as_drafter, drafter_name
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

FOLDER = Path(drafters.__file__).parent
DEFINED = {
    node.name: ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef)
    and node.name.endswith("Drafter")
    and not node.name.startswith("_")
    and not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
}


def test_every_drafter_is_exported():
    """What a module defines can be taken from the package."""
    assert set(DEFINED) <= set(drafters.__all__)


@pytest.mark.parametrize("name", drafters.__all__)
def test_a_name_is_the_modules_own(name):
    """Each name is what its module defines; drafters have the protocol's `start`."""
    found = getattr(drafters, name)

    assert (name, f"rasd_integrations.drafters.{DEFINED.get(name, 'base')}") == (
        found.__name__,
        found.__module__,
    )
    assert issubclass(found, Drafter) or name in ("DraftSession", "Needs")


def test_an_object_without_the_base_classes_gets_the_defaults():
    """`needs` and the session's methods may be missing; those that are there are called."""

    class Session:
        def propose(self, budget):
            return Draft((budget,))

        def learn(self, draft, logits):
            learned.append(draft)

    learned = []
    bare = SimpleNamespace(name="bare", start=lambda _context: Session())
    drafter = as_drafter(bare)
    session = drafter.start(DraftContext(prompt_ids=(1,)))
    session.attach(None, None)
    session.learn(session.propose(3), None)
    session.observe(TokenBlock((1,)))
    session.close()

    assert (drafter.name, drafter.needs, learned) == ("bare", Needs(), [Draft((3,))])
    assert as_drafter(drafter) is drafter


def test_a_dumped_object_is_not_taken_for_a_models_name():
    """Settings that were read back say that the drafter has to be given again."""
    dumped = drafter_name(drafters.SuffixDrafter())

    assert (None, "auto", "small") == tuple(map(drafter_name, (None, "auto", Path("small"))))
    with pytest.raises(ConfigurationError, match="SuffixDrafter>': settings hold no objects"):
        RASD("some/model", drafter=dumped)


def test_importing_the_package_imports_no_torch():
    """Drafters come with the first use; an unknown name is an `AttributeError`."""
    code = (
        "import sys; from rasd_integrations import drafters; print('torch' in sys.modules); "
        "print(hasattr(drafters, 'GuessDrafter'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["False", "False"]
