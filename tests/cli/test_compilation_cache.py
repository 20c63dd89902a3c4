"""The compilation cache: on by default, out of the way of whoever sets JAX's own settings."""

import logging
import os

import jax
import pytest

from jaxtp import compilation_cache

FOLDER, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """JAX's settings as they are without any, and an empty cache folder of the user; all is put back after the test."""
    names = (FOLDER, SECONDS, "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    for name in ("JAXTP_COMPILATION_CACHE", SECONDS.upper()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update(FOLDER, None)
    jax.config.update(SECONDS, 1.0)
    compilation_cache._folder.cache_clear()
    compilation_cache.say.cache_clear()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache._folder.cache_clear()
    compilation_cache.say.cache_clear()


def test_programs_are_kept_in_the_users_cache_folder_by_processor(fresh, caplog):
    with caplog.at_level(logging.INFO, logger="jaxtp"):
        for _ in range(2):
            compilation_cache.use()
            compilation_cache.say()
    folder = fresh / "jaxtp" / "compiled" / compilation_cache.processor()
    assert jax.config.values[FOLDER] == str(folder)
    assert folder.is_dir()
    assert jax.config.values[SECONDS] == 0  # those that are compiled in less than JAX's second as well
    assert [record.message for record in caplog.records if "kept" in record.message] == [
        f"compiled programs are kept in {folder} (JAXTP_COMPILATION_CACHE=0: they are not)"
    ]


def test_jaxs_own_settings_win(fresh, monkeypatch):
    jax.config.update(FOLDER, "/somewhere")
    monkeypatch.setenv(SECONDS.upper(), "1.0")
    compilation_cache.use()
    assert (jax.config.values[FOLDER], jax.config.values[SECONDS]) == ("/somewhere", 1.0)
    jax.config.update(FOLDER, None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.use()
    assert jax.config.values[FOLDER] is None
    assert not fresh.exists()


def test_the_variable_switches_it_off(fresh, monkeypatch):
    monkeypatch.setenv("JAXTP_COMPILATION_CACHE", "0")
    compilation_cache.use()
    assert jax.config.values[FOLDER] is None


def test_a_folder_that_cannot_be_written_is_a_warning_and_no_error(fresh, caplog):
    fresh.write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, logger="jaxtp"):
        compilation_cache.use()
        compilation_cache.use()
    assert jax.config.values[FOLDER] is None
    assert len(caplog.records) == 1
    assert "every start compiles anew" in caplog.records[0].message
    assert str(fresh) in caplog.records[0].message


def test_other_instructions_are_another_processor(monkeypatch):
    mine = compilation_cache.processor()
    read = compilation_cache.Path.read_text
    monkeypatch.setattr(compilation_cache.Path, "read_text", lambda path: read(path).replace(" fpu ", " ") + "")
    if os.path.exists("/proc/cpuinfo") and " fpu " in read(compilation_cache.Path("/proc/cpuinfo")):
        assert compilation_cache.processor() != mine
