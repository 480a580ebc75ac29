"""README.md and docs/: commands, links, file names, fields and numbers are real."""

import functools
import importlib
from pathlib import Path
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from ism_jax import config as config_lib
from ism_jax import config_check, objectives

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted(ROOT.glob('docs/*.md'))]
COMMANDS = (
    *('train', 'sample', 'evaluate', 'prepare_data', 'convert', 'diagnose'),
    *('benchmark', 'ablation', 'demo'),
)
# Programs besides `python` whose arguments are not checked, except for file names.
OTHER_PROGRAMS = ('bash', 'hf', 'jupyter', 'pip', 'ruff', 'source', 'tensorboard')
FOLDERS = ('ism_jax', 'configs', 'launch', 'tests', 'docs', 'results')
SUFFIXES = 'py|md|sh|sbatch|yaml|ipynb|json|txt|cff|png|toml|safetensors'
SECTIONS = tuple(
    name for name, value in config_lib.default().items() if hasattr(value, 'items')
)

# Folders that a run or the user writes.
WRITTEN = ('damaged_checkpoints/', 'grids/', 'tensorboard/')

pages = pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)


def _blocks(page: Path, language: str) -> list[str]:
    pattern = rf'^```{language}\n(.*?)^```$'
    return re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _inline_code(page: Path) -> list[str]:
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', _prose(page))]


def _is_command(code: str) -> bool:
    words = code.split()
    return len(words) > 1 and words[0] in ('python', *OTHER_PROGRAMS)


def _commands(page: Path) -> list[list[str]]:
    """The words of each command of the page, in bash blocks and in sentences."""
    text = '\n'.join(_blocks(page, 'bash')).replace('\\\n', ' ')
    lines = [*text.splitlines(), *filter(_is_command, _inline_code(page))]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def _flags(command: str) -> dict[str, str]:
    """Flag name -> type, of a command of ism_jax."""
    done = subprocess.run(
        [sys.executable, '-m', f'ism_jax.{command}', '--helpxml'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout, done.stderr
    tree = ElementTree.fromstring(done.stdout)
    return {flag.findtext('name'): flag.findtext('type') for flag in tree.iter('flag')}


@functools.cache
def _config_module(path: str):
    spec = importlib.util.spec_from_file_location('documented_config', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _get_config(value: str):
    path, _, argument = value.partition(':')
    assert (ROOT / path).is_file(), f'{path} does not exist'
    # A placeholder: any rung will do.
    return _config_module(path).get_config(argument.replace('<rung>', 'ism'))


def _check_ism_jax(command: str, arguments: list[str]) -> None:
    """The command and its flags exist; its config, with the overrides, is valid."""
    assert command in COMMANDS, f'ism_jax.{command} is not a command'
    flags = _flags(command)
    config, changes = None, []
    words = iter(arguments)
    for word in words:
        if not word.startswith('--'):
            continue  # A subcommand, such as `sit`.
        name, equals, value = word[2:].partition('=')
        if name.startswith('config.'):
            changes.append(f'{name[len("config.") :]}={value}')
            continue
        assert name in flags, f'ism_jax.{command} has no flag --{name}'
        if not equals and flags[name] != 'bool':
            value = next(words)
        if name == 'config':
            config = _get_config(value)
        elif name == 'change':
            changes.append(value)
    if command == 'ablation':
        config = _get_config('configs/ablation.py')
    assert config is not None or not changes
    for change in changes:
        config_lib.set_field(config, change)
    if config is not None:
        config_check.validate(config)


def _check_file(name: str) -> None:
    assert any(list(base.glob(name)) for base in (ROOT, ROOT / 'ism_jax')), (
        f'{name} does not exist'
    )


def _check_command(words: list[str]) -> None:
    while re.fullmatch(r'\w+=\S*', words[0]):  # Variables of the environment.
        words = words[1:]
    program, *arguments = words
    if program == 'python' and arguments[0].startswith('launch/'):
        text = (ROOT / arguments[0]).read_text()
        flags = [word.partition('=')[0] for word in arguments if word.startswith('--')]
        assert all(f"'{flag}'" in text for flag in flags), f'{flags} of {arguments[0]}'
    elif program == 'python':
        assert arguments[0] == '-m', f'only modules are run: {words}'
        package, _, command = arguments[1].partition('.')
        if package == 'ism_jax':
            return _check_ism_jax(command, arguments[2:])
        assert arguments[1] == 'pytest'
    assert program in ('python', *OTHER_PROGRAMS), f'unknown program {program}'
    if arguments[0] == 'launch/local_processes.sh':
        _check_ism_jax(arguments[2].removeprefix('ism_jax.'), arguments[3:])
    for word in arguments:
        if word.startswith(FOLDERS) and not word.startswith('ism_jax.'):
            _check_file(word)


@pages
def test_commands_exist_with_their_flags_and_fields(page):
    for words in _commands(page):
        try:
            _check_command(words)
        except (AssertionError, ValueError) as error:
            pytest.fail(f'{shlex.join(words)}: {error}')


def test_every_command_is_documented():
    text = ''.join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f'ism_jax.{name}' not in text] == []


@pages
def test_files_and_modules_exist(page):
    for code in _inline_code(page):
        name = code.partition(':')[0]
        if re.fullmatch(rf'[\w.*/-]+/([\w.*-]+\.({SUFFIXES}))?', name):
            if 'NAME' not in name and name not in WRITTEN:
                _check_file(name)
        if re.fullmatch(r'ism_jax(\.\w+)+', name):
            _resolve(name)


def _resolve(name: str) -> None:
    """Imports the module of a dotted name and gets the attribute that may follow it."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition('.')
        assert hasattr(importlib.import_module(module), attribute), name


@pages
def test_fields_exist(page):
    """Names such as `data.source` are fields, or options of a method."""
    fields = set(config_lib.flatten(config_lib.default()))
    for name in objectives.names():
        fields |= {f'objective.{option}' for option in objectives.options(name)}
    for code in _inline_code(page):
        flag = re.fullmatch(r'--config\.([\w.]+)=.*', code)
        name = flag[1] if flag else re.split(r'[ =]', code)[0]
        section = name.partition('.')[0]
        if flag or (section in SECTIONS and re.fullmatch(r'\w+\.\w+', name)):
            if name.rpartition('.')[2] not in SUFFIXES.split('|'):
                assert name in fields, f'{name} is not a field'


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)]+)\)', _prose(page)):
        if target.startswith('https://'):
            continue
        name, _, anchor = target.partition('#')
        path = (page.parent / name) if name else page
        assert path.is_file(), f'{target} does not exist'
        if anchor:
            headings = re.findall(r'^#+ (.*)$', path.read_text(), flags=re.MULTILINE)
            assert anchor in map(_slug, headings), f'{target}: no such heading'


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')


@pages
def test_python_compiles(page):
    for code in _blocks(page, 'python'):
        compile(code, page.name, 'exec')


def test_the_readmes_python_samples(small_run):
    (code,) = _blocks(ROOT / 'README.md', 'python')
    names = {}
    exec(code.replace('runs/quickstart', str(small_run)), names)
    assert names['images'].shape == (3, 32, 32, 1)


def test_the_architecture_names_every_folder_and_module():
    """The tree names all of `ism_jax/`, and the import rules name every layer."""
    page = ROOT / 'docs' / 'architecture.md'
    (tree,) = re.findall(r'^```\n(ism_jax/.*?)^```$', page.read_text(), re.S | re.M)
    package = ROOT / 'ism_jax'
    folders = {path.parent.name for path in package.glob('*/__init__.py')}
    modules = {path.stem for path in package.glob('[a-z]*.py')}
    missing = [name for name in folders if f'\n  {name}/ ' not in tree]
    missing += [name for name in modules if not re.search(rf'\b{name}\b', tree)]
    assert missing == []
    rules = page.read_text().split('## Import rules')[1].split('\n## ')[0]
    layers = {name for name in re.findall(r'`(\w+)`', rules)}
    assert folders <= layers


def _rows(path: Path) -> dict[str, list[str]]:
    """First cell -> the others, of the rows of tables that have a standard error."""
    rows = [line for line in path.read_text().splitlines() if line.startswith('| ')]
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
    return {first: rest for first, *rest in cells if ' ± ' in ''.join(rest)}


def test_the_tables_are_those_of_the_records():
    documented = (ROOT / 'docs' / 'results.md').read_text().splitlines()
    for name in ('ladder', 'systems'):
        table = (ROOT / 'results' / f'{name}.md').read_text().splitlines()
        assert len(table) > 5 and set(table) <= set(documented), name
    records = {
        re.sub(r'/train\.steps=\d+', '', name): cells
        for name, cells in _rows(ROOT / 'results' / 'systems.md').items()
    }
    readme = _rows(ROOT / 'README.md')
    assert readme.keys() == records.keys()
    for name, cells in readme.items():
        one, _, four, _, many, _, calls, _ = records[name]
        assert cells == [calls, one, four, many]


def test_the_changelog_names_modules_that_exist():
    text = (ROOT / 'CHANGELOG.md').read_text()
    rows = re.findall(r'^\| (`.*`) \| (`.*`) \|$', text, flags=re.MULTILINE)
    assert len(rows) > 30
    for _, now in rows:
        for name in re.findall(r'`([\w.]+)`', now):
            path = ROOT / 'ism_jax' / name.replace('.', '/')
            assert path.with_suffix('.py').is_file() or path.is_dir(), name
