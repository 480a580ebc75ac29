"""A web page to play with a trained network.

    pip install gradio
    python -m ism_jax.demo --workdir runs/quickstart

`--workdir` takes what `ism_jax.load` takes: a run, an exported network, a hub id. The
page is at http://127.0.0.1:7860, for this machine alone; `--host` elsewhere needs
`--share-host`, as everyone who reaches it may then use this machine's time.

One visitor cannot exhaust the machine: requests are served one after the other, so many
wait at most, and each is bounded in images and steps.
"""

from collections.abc import Callable
import dataclasses
import html
import ipaddress
import os
from pathlib import Path
import tempfile
import threading
import time

from absl import app, flags
import numpy as np

from ism_jax import generator
from ism_jax.method import time_grid
from ism_jax.runtime import command_line
from ism_jax.sampling import image_grid

MAX_IMAGES = 16
SHOWN_SIDE = 128  # Pixels; smaller images are shown larger.
MAX_PATH_STEPS = 16
MAX_WAITING = 16
MAX_TEXT, MAX_MESSAGE = 2000, 300  # Letters.
MAX_SEED = 2**31 - 1
SIDE_BY_SIDE = (1, 2, 4, 8, 128)
ANY_CLASS = 'any'
# What stands beside a field takes no room while there is nothing to say.
QUIET = '[class*="beside-"]:not(:has([role="alert"])) { display: none }'


class FieldError(ValueError):
    """A bad value in a field of the page.

    Attributes:
      field: its name.
    """

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Made:
    """A picture, what made it, and how long that took.

    Attributes:
      image: uint8 [H, W, C], a grid.
      settings: by name.
      seconds: for all of it.
      count: images in it.
    """

    image: np.ndarray
    settings: dict
    seconds: float
    count: int

    def told(self) -> str:
        each = self.seconds / self.count * 1000
        return f'{self.count} images in {self.seconds:.2f} s, {each:.0f} ms each'


class Studio:
    """What the page does, without the page: settings in, pictures out.

    Args:
      model: of `ism_jax.load`.
      folder: for the pictures; a temporary one by default.
    """

    def __init__(self, model: generator.Generator, folder=None):
        if model.image_shape[2] not in (1, 3):
            raise ValueError(
                f'{model} makes {model.image_shape[2]} channels, no images; set '
                'data.autoencoder where it was trained on latents'
            )
        self.model = model
        self.folder = Path(folder or tempfile.mkdtemp(prefix='ism_jax_demo_'))
        self._scale = max(1, SHOWN_SIDE // model.image_shape[0])

    def warm_up(self) -> None:
        """Compiles what the page asks for first."""
        self.samples(ANY_CLASS, 0, 4, '', self.default_guidance(), 4)

    def warm_up_more(self) -> None:
        """Compiles what the other tabs will ask for."""
        w = self.default_guidance()
        if self.model.has_paths:
            self.path(ANY_CLASS, 0, 4, w)
            self.between(ANY_CLASS, 0, 1, 4, w, 4)
        self.side_by_side(ANY_CLASS, 0, w)

    def default_guidance(self) -> float:
        low, high = self.model.guidance_range
        return min(max(1.5, low), high)

    def samples(self, label, seed, steps, schedule, guidance, count) -> Made:
        """Images of one class (of each in turn, for any)."""
        count = _bounded('count', count, 1, MAX_IMAGES)
        labels = [self._label(label, number) for number in range(count)]
        about = self._about(label, seed, guidance) | self._steps(steps, schedule)
        return self._make(
            lambda: self.model.sample(
                labels, guidance=guidance, seed=int(seed), schedule=about['schedule']
            ),
            about,
        )

    def side_by_side(self, label, seed, guidance) -> Made:
        """One noise at several numbers of steps."""
        steps = self.side_by_side_steps()
        about = self._about(label, seed, guidance) | {'steps': steps}
        options = dict(guidance=guidance, seed=int(seed))
        label = self._label(label, 0)
        return self._make(
            lambda: np.concatenate(
                [self.model.sample(label, steps=n, **options) for n in steps]
            ),
            about,
        )

    def side_by_side_steps(self) -> list[int]:
        return [n for n in SIDE_BY_SIDE if n <= self.model.base_steps]

    def path(self, label, seed, steps, guidance) -> Made:
        """From noise to image."""
        steps = _bounded('steps', steps, 1, MAX_PATH_STEPS)
        about = self._about(label, seed, guidance) | {'steps': steps}
        label = self._label(label, 0)
        return self._make(
            lambda: self.model.path(label, steps, guidance, int(seed)), about
        )

    def between(self, label, seed, last_seed, steps, guidance, count) -> Made:
        """Images between those of two seeds."""
        count = _bounded('count', count, 2, MAX_IMAGES)
        about = self._about(label, seed, guidance) | self._steps(steps, '')
        about['last_seed'] = _bounded('last_seed', last_seed, 0, MAX_SEED)
        seeds = (int(seed), int(last_seed))
        label = self._label(label, 0)
        return self._make(
            lambda: self.model.between(label, seeds, count, int(steps), guidance), about
        )

    def save(self, made: Made) -> str:
        """Writes the picture, with its settings in it; returns the path."""
        path = self.folder / f'ism_jax_{time.time_ns()}.png'
        image_grid.write_png(path, made.image, made.settings)
        # Those that a page still shows are among the last.
        for old in sorted(self.folder.glob('ism_jax_*.png'))[:-256]:
            old.unlink(missing_ok=True)
        return str(path)

    def _make(self, make: Callable[[], np.ndarray], about: dict) -> Made:
        started = time.perf_counter()
        images = make()
        seconds = time.perf_counter() - started
        image = image_grid.grid(images, min(len(images), 9), scale=self._scale)
        return Made(image, about, seconds, len(images))

    def _about(self, label, seed, guidance) -> dict:
        low, high = self.model.guidance_range
        return {
            'class': str(label),
            'seed': _bounded('seed', seed, 0, MAX_SEED),
            'guidance': _bounded('guidance', guidance, low, high, kind=float),
            'trained_steps': self.model.trained_steps,
        }

    def _steps(self, steps, schedule: str) -> dict:
        base_steps = self.model.base_steps
        if schedule.strip():
            try:
                chosen = command_line.parse_numbers(schedule[:MAX_TEXT], float)
            except ValueError as error:
                raise FieldError(
                    'schedule', 'is not a list of numbers such as 0.5,0.25,0.25'
                ) from error
            try:
                time_grid.check_schedule(chosen, base_steps)
            except ValueError as error:
                raise FieldError('schedule', str(error)[:MAX_MESSAGE]) from error
            return {'schedule': chosen}
        steps = _bounded('steps', steps, 1, base_steps)
        return {'schedule': time_grid.dyadic_schedule(steps, base_steps)}

    def _label(self, label, number: int):
        if label == ANY_CLASS:
            return number % len(self.model.class_names)
        if label not in self.model.class_names:
            raise FieldError('label', 'is no class of this network')
        return label


def _bounded(field: str, value, low, high, kind=int):
    good = isinstance(value, (int, float)) and low <= value <= high
    if not good or kind(value) != value:
        number = 'a whole number' if kind is int else 'a number'
        raise FieldError(field, f'must be {number} in {low} .. {high}')
    return kind(value)


def make_page(studio: Studio):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    model = studio.model
    low, high = model.guidance_range
    classes = [ANY_CLASS, *model.class_names]

    fields = {
        'label': lambda: gr.Dropdown(classes, value=ANY_CLASS, label='Class'),
        'seed': lambda: gr.Number(0, label='Seed'),
        'last_seed': lambda: gr.Number(1, label='Last seed'),
        'steps': lambda most=model.base_steps: gr.Slider(
            1, most, value=min(4, most), step=1, label='Steps'
        ),
        'schedule': lambda: gr.Textbox(
            '', label='Schedule instead of steps, such as 0.5,0.25,0.25', max_lines=1
        ),
        'guidance': lambda: gr.Slider(
            low, high, value=studio.default_guidance(), step=0.1, label='Guidance',
            interactive=low < high,
        ),
        'count': lambda least=1: gr.Slider(
            least, MAX_IMAGES, value=4, step=1, label='Images'
        ),
    }  # fmt: skip

    def tab(title: str, names: list[str], make, about: str, **changes):
        """A tab of these fields; returns its function and what goes in and out."""
        with gr.Tab(title):
            gr.Markdown(about)
            with gr.Row():
                with gr.Column(scale=1):
                    inputs, beside = [], []
                    for name in names:
                        inputs.append((changes.get(name) or fields[name])())
                        beside.append(
                            gr.HTML(padding=False, elem_classes=f'beside-{name}')
                        )
                    button = gr.Button('Make', variant='primary')
                with gr.Column(scale=2):
                    image = gr.Image(
                        type='filepath', format='png', interactive=False,
                        show_label=False, buttons=['download', 'fullscreen'],
                    )  # fmt: skip
                    told = gr.Markdown(elem_classes='told')

        def run(*values):
            errors = [''] * len(names)
            try:
                made = make(**dict(zip(names, values)))
            except FieldError as error:
                message = html.escape(str(error))
                place = names.index(error.field)
                errors[place] = (
                    f'<span role="alert" style="color:#b00">{message}</span>'
                )
                return gr.skip(), gr.skip(), *errors
            return studio.save(made), made.told(), *errors

        moved = [
            part.release if isinstance(part, gr.Slider) else part.change
            for part in inputs
        ]
        outputs = [image, told, *beside]
        gr.on(
            [button.click, *moved], run, inputs, outputs, concurrency_id='model',
            trigger_mode='always_last', api_name=False, show_progress='minimal',
        )  # fmt: skip
        return run, inputs, outputs

    with gr.Blocks(title='ism_jax', analytics_enabled=False) as page:
        gr.Markdown(
            f'# One network, any number of steps\n{html.escape(repr(model))}. The '
            'pictures, as downloaded, have their settings in them.'
        )
        first = tab(
            'Samples',
            ['label', 'seed', 'steps', 'schedule', 'guidance', 'count'],
            studio.samples,
            'More steps, more guidance: what changes, what stays?',
        )
        tab(
            'Steps side by side',
            ['label', 'seed', 'guidance'],
            studio.side_by_side,
            'The same noise in '
            f'{", ".join(str(n) for n in studio.side_by_side_steps())} steps.',
        )
        if model.has_paths:
            tab(
                'From noise to image',
                ['label', 'seed', 'steps', 'guidance'],
                studio.path,
                'What is there after each step.',
                steps=lambda: fields['steps'](min(MAX_PATH_STEPS, model.base_steps)),
            )
            tab(
                'Between two seeds',
                ['label', 'seed', 'last_seed', 'steps', 'guidance', 'count'],
                studio.between,
                'Images of the noises between those of two seeds.',
                count=lambda: fields['count'](2),
            )
        page.load(first[0], first[1], first[2], concurrency_id='model', api_name=False)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def check_host(host: str, share_host: bool) -> None:
    """Refuses to serve other machines by oversight.

    Raises:
      ValueError: the address is not this machine's own.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == 'localhost'
    if not local and not share_host:
        raise ValueError(
            f'--host {host} lets other machines use this one; say so with '
            '--share-host, or leave it at 127.0.0.1'
        )


def run_flags():
    """Does what the command line says."""
    share_host = FLAGS['share-host'].value
    check_host(FLAGS.host, share_host)
    # It would call home when it is imported.
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError('the page needs gradio: pip install gradio') from error
    studio = Studio(generator.load(FLAGS.workdir, FLAGS.step))
    print(f'{studio.model}\ncompiling', flush=True)
    studio.warm_up()
    # While the first visitor looks at the first picture.
    threading.Thread(target=studio.warm_up_more, daemon=True).start()
    make_page(studio).launch(
        server_name=FLAGS.host, server_port=FLAGS.port, share=False, max_threads=8,
        allowed_paths=[str(studio.folder)], max_file_size='1kb', ssr_mode=False,
        # Fonts of this machine: the usual ones are fetched from elsewhere.
        theme=gr.themes.Default(font='system-ui', font_mono='monospace'),
        footer_links=[], css=QUIET,
    )  # fmt: skip


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string(
        'workdir', None, 'Run, exported folder or hub id.', required=True
    )
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest if not given.')
    flags.DEFINE_string('host', '127.0.0.1', 'Address to listen at.')
    flags.DEFINE_integer('port', 7860, 'Port to listen at.', 1, 65535)
    flags.DEFINE_bool('share-host', False, 'Serve other machines too.')
    app.run(command_line.main(run_flags))
