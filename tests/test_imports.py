"""Imports run one way, through the rooms in their order, and no modules import each other."""

import pytest
from imports import ROOMS, circle, graph, room


def test_every_room_imports_only_those_above_it():
    wrong = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for name in names
        if "jaxtp" not in (module, name) and ROOMS.index(room(name)) > ROOMS.index(room(module))
    ]
    assert wrong == []


def test_every_room_has_its_place():
    assert {room(module) for module in graph()} - {"__init__"} == set(ROOMS)


def test_no_modules_import_each_other():
    assert circle(graph()) == []


@pytest.mark.parametrize(
    "back",
    [
        "from house.kitchen.sink import wash",
        "from house.kitchen import sink",
        "def dry():\n    from house.kitchen import sink",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.kitchen.sink",
        "from house import taps",  # by way of a third
        "from house.kitchen import wash",  # by way of the room's own __init__
    ],
)
def test_a_circle_is_found_wherever_it_is_closed(back, tmp_path):
    files = {
        "__init__": "",
        "taps": "from house.kitchen import sink",
        "kitchen/__init__": "from house.kitchen.sink import wash",
        "kitchen/sink": "from house.kitchen.towel import dry",
        "kitchen/towel": "import functools",
    }
    for name, text in files.items():
        path = tmp_path / "house" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert circle(graph(tmp_path / "house")) == []
    (tmp_path / "house/kitchen/towel.py").write_text(back)
    assert {"house.kitchen.sink", "house.kitchen.towel"} <= set(circle(graph(tmp_path / "house")))
