import ml_collections
import pytest

from jaxshape import system as system_lib
from jaxshape.errors import InputError
from tests.tiny import settings


def _config(**fields):
  return ml_collections.ConfigDict(fields)


def test_names_are_the_files_in_order():
  names = system_lib.names()
  assert "texture_suppression" in names
  assert names == sorted(set(names))
  assert not any(name.startswith("_") for name in names)


def test_a_module_outside_the_package_can_be_named():
  system = system_lib.load(settings.config("closed_form"))
  assert isinstance(system, system_lib.System)
  assert system.train_step is None
  assert list(system.evaluators) == ["test"]


@pytest.mark.parametrize(
  "name",
  ["texture_supression", "no.such_module", ".", "..up", "json.", "json.x"],
)
def test_names_of_no_system_are_refused_with_those_there_are(name):
  with pytest.raises(
    InputError, match=r"is no system; there are: .*texture_suppression"
  ):
    system_lib.load(_config(system=name))


@pytest.mark.parametrize(
  "fields", [{}, {"system": None}, {"system": ""}, {"system": 3}]
)
def test_a_config_without_a_name_is_refused(fields):
  with pytest.raises(
    InputError, match=r"config.system must be the name.*texture_suppression"
  ):
    system_lib.load(_config(**fields))


def test_a_module_that_makes_nothing_is_refused():
  with pytest.raises(
    InputError, match=r"'tests.tiny.settings' is no system; there are"
  ):
    system_lib.load(_config(system="tests.tiny.settings"))


def test_a_system_that_cannot_be_imported_keeps_its_error(
  tmp_path, monkeypatch
):
  folder = tmp_path / "broken_package"
  folder.mkdir()
  (folder / "__init__.py").write_text("")
  (folder / "broken.py").write_text("import no_such_library_at_all\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match="no_such_library_at_all"):
    system_lib.load(_config(system="broken_package.broken"))
