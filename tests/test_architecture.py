"""The rules of docs/architecture.md: imports, the config, and lengths."""

import ast
from pathlib import Path
import re

import pytest

from ism_jax import config as config_lib
from ism_jax import objectives

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'ism_jax'
COMMANDS = (
    'train', 'sample', 'evaluate', 'prepare_data', 'convert', 'diagnose', 'benchmark',
    'ablation', 'demo',
)  # fmt: skip
# A module imports from its own layer or from those below.
LAYERS = (
    COMMANDS,
    ('__init__', 'config', 'config_check', 'resolved_config', 'experiment',
     'trained_network', 'generator', 'sharing', 'model_card', 'cost', 'compiled_plan',
     'figure_ratios',
     'recipe_search', 'entry_points'),
    ('training', 'sampling', 'evaluation', 'diagnosis', 'interchange'),
    ('objectives', 'transport', 'data'),
    ('method', 'models'),
    ('runtime',),
)  # fmt: skip
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
BELOW_EXPERIMENT = [name for layer in LAYERS[2:] for name in layer]
MODULES = sorted(PACKAGE.rglob('*.py'))
FIELDS = [
    *config_lib.FIELDS,
    *(
        f'objective.{o}'
        for name in objectives.names()
        for o in objectives.options(name)
    ),
]


def part(path: Path) -> str:
    """The folder or the top-level module that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix('.py')


def imported_parts(path: Path) -> set[str]:
    """Folders and top-level modules of ism_jax that a file imports, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'ism_jax':
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith('ism_jax.'):
            found.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import):
            names = [a.name.split('.') for a in node.names]
            found |= {n[1] for n in names if n[0] == 'ism_jax' and len(n) > 1}
    return found


def test_every_part_of_the_package_has_a_layer():
    assert {part(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own, imported = part(path), imported_parts(path)
    commands = imported & set(COMMANDS)
    assert not commands, f'{path} imports the command {commands}'
    upward = {name for name in imported if LEVEL[name] < LEVEL[own]}
    assert not upward, f'{path} of {own} imports {upward}'


def test_folders_of_one_layer_have_no_import_cycle():
    graph = {}
    for path in MODULES:
        if part(path) in BELOW_EXPERIMENT:
            graph.setdefault(part(path), set()).update(imported_parts(path))
    while graph:
        free = [
            name for name, uses in graph.items() if not uses & graph.keys() - {name}
        ]
        assert free, f'a circle among {sorted(graph)}'
        for name in free:
            del graph[name]


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the constants that are docstrings."""
    found = set()
    for node in ast.walk(tree):
        body = getattr(node, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            found.add(id(body[0].value))
    return found


@pytest.mark.parametrize(
    'path',
    [p for p in MODULES if part(p) in BELOW_EXPERIMENT],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_only_the_upper_layers_know_the_config(path):
    tree = ast.parse(path.read_text())
    assert 'config' not in imported_parts(path)
    names = re.compile(
        r'(?<![\w.])(' + '|'.join(re.escape(f) for f in FIELDS if '.' in f) + r')\b'
    )
    sections = {field.partition('.')[0] for field in FIELDS if '.' in field}
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in skipped:
                named = names.search(node.value)
                assert not named, f'{path}:{node.lineno} names the field {named[0]}'
        reads = (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == 'config'
            and node.attr in sections
        )
        assert not reads, f'{path}:{node.lineno} reads config.{node.attr}'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f'{path}: {node.name} has {length} lines'


def test_the_train_command_is_short():
    assert len((PACKAGE / 'train.py').read_text().splitlines()) <= 200


def test_checks_are_at_the_border():
    """Fewer than 10 raises per 1,000 lines."""
    lines = [line for path in MODULES for line in path.read_text().splitlines()]
    raises = sum(line.lstrip().startswith('raise ') for line in lines)
    assert 1000 * raises < 10 * len(lines), (raises, len(lines))


def test_tests_mirror_the_package():
    """Each folder of tests is one of the package; each names a module that exists."""
    folders = [p.name for p in (ROOT / 'tests').iterdir() if p.is_dir()]
    assert set(folders) - {'fixtures', '__pycache__'} <= set(BELOW_EXPERIMENT)
