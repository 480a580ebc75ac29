"""Serves a web page to explore a trained network.

    pip install gradio
    python -m ism_jax.demo --workdir runs/quickstart

`--workdir` takes what `ism_jax.load` takes: a run, an exported network or a hub id. The
page is at http://127.0.0.1:7860, for this machine alone. Any other `--host` needs
`--share-host`, because everyone who reaches the page can use this machine's time.

No visitor can exhaust the machine: requests run one after the other, the queue is
bounded, and so are the images and steps of a request.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import html
import ipaddress
import os
from pathlib import Path
import tempfile
import threading
import time

from absl import flags
import numpy as np

from ism_jax import generator
from ism_jax.runtime import command_line
from ism_jax.sampling import image_grid

MAX_IMAGES = 16
MAX_PATH_STEPS = 16
MAX_GUIDANCE = 10.0  # For methods that set no limit.
MAX_SEED = 2**31 - 1
MAX_QUEUE = 16
MAX_TEXT, MAX_MESSAGE = 2000, 300  # Characters.
MAX_PICTURES = 256
DISPLAY_SIDE = 128  # Pixels; smaller images are enlarged.
COMPARED_STEPS = (1, 2, 4, 8)
FRAMES_PER_STEP = 6  # Of the animation of a path.
FRAME_SECONDS, LAST_FRAME_SECONDS = 0.08, 1.5
ANY_CLASS, NO_CLASS = 'any', 'none'
CSS = """
/* An empty error beside a field takes no space. */
[class*="beside-"]:not(:has([role="alert"])) { display: none }
/* On a phone the picture comes first, above the fields. */
@media (max-width: 640px) { .tab-row { flex-direction: column-reverse } }
"""


class FieldError(ValueError):
    """A bad value in a field of the page.

    Attributes:
      field: name of the field.
    """

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Picture:
    """A grid of images and how it was made.

    Attributes:
      frames: uint8 [F, H, W, C]; more than one is an animation.
      settings: values by name.
      seconds: time to make all images.
      count: number of images.
    """

    frames: np.ndarray
    settings: dict
    seconds: float
    count: int

    def timing(self) -> str:
        """Seconds in all and milliseconds per image."""
        each = self.seconds / self.count * 1000
        return f'{self.count} images in {self.seconds:.2f} s, {each:.0f} ms each'


class Studio:
    """The page without its user interface: settings in, pictures out.

    The methods that make pictures also take the conditions of `_settings`, and raise
    `FieldError` for a value that the network was not trained for.

    Args:
      model: from `ism_jax.load`.

    Attributes:
      folder: temporary, for the files of pictures.
    """

    def __init__(self, model: generator.Generator):
        if model.image_shape[2] not in (1, 3):
            raise ValueError(
                f'{model} generates {model.image_shape[2]} channels, not images; set '
                'data.autoencoder in the config of a run on latents'
            )
        self.model = model
        self.folder = Path(tempfile.mkdtemp(prefix='ism_jax_demo_'))
        low, high = model.guidance_range
        self.guidance_range = low, min(high, max(low, MAX_GUIDANCE))
        self.default_guidance = min(max(1.5, low), self.guidance_range[1])
        self.compared_steps = [n for n in COMPARED_STEPS if n <= model.base_steps]
        self._scale = max(1, DISPLAY_SIDE // model.image_shape[0])

    def warm_up(self) -> None:
        """Compiles the programs of the first picture."""
        self.samples(steps=4, schedule='', count=4, **self.default_conditions)

    def warm_up_more(self) -> None:
        """Compiles the programs of the other tabs."""
        conditions = self.default_conditions
        self.side_by_side(**conditions)
        if self.model.has_paths:
            self.path(steps=4, **conditions)
            self.between(last_seed=1, steps=4, count=4, **conditions)

    @property
    def default_conditions(self) -> dict:
        """The conditions of a page that has just been opened."""
        start, end = self.model.default_interval or (None, None)
        return dict(
            label=ANY_CLASS,
            seed=0,
            guidance=self.default_guidance,
            start=start,
            end=end,
        )

    def samples(self, *, steps, schedule, count, **conditions) -> Picture:
        """Samples of one class, or of the classes in turn."""
        count = _bounded('count', count, 1, MAX_IMAGES)
        settings = self._settings(**conditions) | self._schedule(steps, schedule)
        labels = [self._label(conditions['label'], index) for index in range(count)]
        return self._picture(
            lambda: self.model.sample(
                labels, seed=settings['seed'], **_sampling(settings)
            ),
            settings,
        )

    def side_by_side(self, **conditions) -> Picture:
        """Samples from the same noise with several numbers of steps."""
        settings = self._settings(**conditions) | {'steps': self.compared_steps}
        options = _sampling(settings) | {'seed': settings['seed']}
        label = self._label(conditions['label'], 0)

        def sample(number):
            return self.model.sample(label, steps=number, **options)

        def make():
            # One image does not occupy all cores.
            with futures.ThreadPoolExecutor() as pool:
                return np.concatenate(list(pool.map(sample, self.compared_steps)))

        return self._picture(make, settings)

    def path(self, *, steps, **conditions) -> Picture:
        """One sampling path from noise to image, as an animation."""
        steps = _bounded('steps', steps, 1, MAX_PATH_STEPS)
        settings = self._settings(**conditions) | {'steps': steps}
        options = _sampling(settings) | {'seed': settings['seed']}
        label = self._label(conditions['label'], 0)
        return self._picture(
            lambda: self.model.path(label, steps, **options), settings, path_frames
        )

    def between(self, *, last_seed, steps, count, **conditions) -> Picture:
        """Images from noise that is interpolated between two seeds."""
        count = _bounded('count', count, 2, MAX_IMAGES)
        settings = self._settings(**conditions) | self._schedule(steps, '')
        settings['last_seed'] = _bounded('last_seed', last_seed, 0, MAX_SEED)
        seeds = settings['seed'], settings['last_seed']
        label = self._label(conditions['label'], 0)
        return self._picture(
            lambda: self.model.between(label, seeds, count, **_sampling(settings)),
            settings,
        )

    def save(self, picture: Picture) -> str:
        """Writes the picture with its settings as metadata; returns the file's path."""
        path = self.folder / f'ism_jax_{time.time_ns()}.png'
        seconds = [FRAME_SECONDS] * (len(picture.frames) - 1) + [LAST_FRAME_SECONDS]
        image_grid.write_png(path, picture.frames, picture.settings, seconds)
        # Only recent pictures can still be on a visitor's page.
        for old in sorted(self.folder.glob('ism_jax_*.png'))[:-MAX_PICTURES]:
            old.unlink(missing_ok=True)
        return str(path)

    def _picture(
        self,
        make: Callable[[], np.ndarray],
        settings: dict,
        frames_of: Callable[[np.ndarray], list[np.ndarray]] = lambda images: [images],
    ) -> Picture:
        """Makes images and tiles each of the frames that show them."""
        started = time.perf_counter()
        images = make()
        seconds = time.perf_counter() - started
        frames = np.stack(
            [
                image_grid.grid(frame, min(len(frame), 9), scale=self._scale)
                for frame in frames_of(images)
            ]
        )
        return Picture(frames, settings, seconds, len(images))

    def _settings(self, *, label, seed, guidance, start=None, end=None) -> dict:
        """The checked conditions of a picture.

        Args:
          label: name of a class, `ANY_CLASS` or `NO_CLASS`.
          seed: of the noise.
          guidance: guidance scale w.
          start, end: guidance interval; None if the network is not conditioned on it.
        """
        settings = {
            'class': str(label),
            'seed': _bounded('seed', seed, 0, MAX_SEED),
            'guidance': _bounded(
                'guidance', guidance, *self.guidance_range, kind=float
            ),
            'trained_steps': self.model.trained_steps,
        }
        if self.model.default_interval is not None:
            start = _bounded('start', start, 0, 1, kind=float)
            end = _bounded('end', end, 0, 1, kind=float)
            if start >= end:
                raise FieldError('end', 'must be later than the start')
            settings['interval'] = start, end
        return settings

    def _schedule(self, steps, schedule: str) -> dict:
        if not schedule.strip():
            steps = _bounded('steps', steps, 1, self.model.base_steps)
            return {'schedule': self.model.schedule(steps)}
        try:
            chosen = command_line.parse_numbers(schedule[:MAX_TEXT], float)
        except ValueError as error:
            message = 'is not a list of numbers such as 0.5,0.25,0.25'
            raise FieldError('schedule', message) from error
        try:
            return {'schedule': self.model.schedule(chosen)}
        except ValueError as error:
            raise FieldError('schedule', str(error)[:MAX_MESSAGE]) from error

    def _label(self, label, index: int):
        if label == NO_CLASS:
            return None
        if label == ANY_CLASS:
            return index % len(self.model.class_names)
        if label not in self.model.class_names:
            raise FieldError('label', 'is not a class of this network')
        return label


def _sampling(settings: dict) -> dict:
    """The settings that methods of `Generator` take by the same names."""
    names = ('guidance', 'schedule', 'interval')
    return {name: settings[name] for name in names if name in settings}


def path_frames(states: np.ndarray) -> list[np.ndarray]:
    """Frames of a path: the moving image, and the states that it has reached.

    Within a step the state moves on a straight line, so the frames between two states
    are exact.

    Args:
      states: uint8 [steps + 1, H, W, C].

    Returns:
      Arrays [steps + 2, H, W, C].
    """
    steps = len(states) - 1
    frames = []
    for position in np.linspace(0, steps, steps * FRAMES_PER_STEP + 1):
        reached = int(position)
        after = states[min(reached + 1, steps)].astype(np.float32)
        moving = states[reached] + (position - reached) * (after - states[reached])
        blank = np.full_like(states[reached + 1 :], image_grid.BACKGROUND)
        shown = [moving.round().astype(np.uint8)[None], states[: reached + 1], blank]
        frames.append(np.concatenate(shown))
    return frames


def _bounded(field: str, value, low, high, kind=int):
    """The value as `kind`, in [low, high]."""
    valid = isinstance(value, (int, float)) and low <= value <= high
    if not valid or kind(value) != value:
        number = 'an integer' if kind is int else 'a number'
        raise FieldError(field, f'must be {number} in {low} .. {high}')
    return kind(value)


@dataclasses.dataclass(frozen=True)
class Tab:
    """A tab of the page.

    Attributes:
      title: title of the tab.
      about: one line below the title.
      make: method of the studio; takes the fields by name.
      fields: names of the fields, in order.
      options: limits that replace a field's own, by field.
    """

    title: str
    about: str
    make: Callable[..., Picture]
    fields: tuple[str, ...]
    options: dict[str, dict] = dataclasses.field(default_factory=dict)


def make_tabs(studio: Studio) -> list[Tab]:
    """The tabs that suit the network."""
    numbers = ', '.join(map(str, studio.compared_steps))
    interval = ('start', 'end') if studio.model.default_interval is not None else ()
    tabs = [
        Tab(
            'Samples',
            'Change the steps or the guidance scale, and keep the seed to compare.',
            studio.samples,
            ('label', 'seed', 'steps', 'schedule', 'guidance', *interval, 'count'),
        ),
        Tab(
            'Steps side by side',
            f'Samples from the same noise in {numbers} steps. Move the guidance.',
            studio.side_by_side,
            ('guidance', *interval, 'label', 'seed'),
        ),
    ]
    if studio.model.has_paths:
        tabs += [
            Tab(
                'From noise to image',
                'The path of one image, and the state after each step.',
                studio.path,
                ('label', 'seed', 'steps', 'guidance', *interval),
                {'steps': dict(maximum=min(MAX_PATH_STEPS, studio.model.base_steps))},
            ),
            Tab(
                'Between two seeds',
                'Images from noise that is interpolated between two seeds.',
                studio.between,
                ('label', 'seed', 'last_seed', 'steps', 'guidance', *interval, 'count'),
                {'count': dict(minimum=2)},
            ),
        ]
    return tabs


def make_field(studio: Studio, name: str, **limits):
    """A Gradio component to enter a value; call it inside a `gradio.Blocks`."""
    import gradio as gr

    low, high = studio.guidance_range
    steps = limits.pop('maximum', studio.model.base_steps)
    start, end = studio.model.default_interval or (0, 1)
    fields = {
        'label': lambda: gr.Dropdown(
            [ANY_CLASS, NO_CLASS, *studio.model.class_names],
            value=ANY_CLASS,
            label='Class',
        ),
        'seed': lambda: gr.Number(0, label='Seed'),
        'last_seed': lambda: gr.Number(1, label='Last seed'),
        'steps': lambda: gr.Slider(
            1, steps, value=min(4, steps), step=1, label='Steps'
        ),
        'schedule': lambda: gr.Textbox(
            '', label='Step sizes instead of steps, such as 0.5,0.25,0.25', max_lines=1
        ),
        'guidance': lambda: gr.Slider(
            low,
            high,
            value=studio.default_guidance,
            step=0.1,
            label='Guidance',
            interactive=low < high,
        ),
        'start': lambda: gr.Slider(
            0, 1, value=start, step=0.05, label='Guidance from time'
        ),
        'end': lambda: gr.Slider(
            0, 1, value=end, step=0.05, label='Guidance until time'
        ),
        'count': lambda: gr.Slider(
            limits.get('minimum', 1), MAX_IMAGES, value=4, step=1, label='Images'
        ),
    }
    return fields[name]()


def add_tab(studio: Studio, tab: Tab) -> tuple[Callable, list, list]:
    """Adds a tab to the page.

    Returns:
      The function that makes its picture, and the function's inputs and outputs.
    """
    import gradio as gr

    with gr.Tab(tab.title):
        gr.Markdown(tab.about)
        with gr.Row(elem_classes='tab-row'):
            with gr.Column(scale=1):
                inputs, errors = [], []
                for name in tab.fields:
                    limits = tab.options.get(name, {})
                    inputs.append(make_field(studio, name, **limits))
                    errors.append(gr.HTML(padding=False, elem_classes=f'beside-{name}'))
                button = gr.Button('Generate', variant='primary')
            with gr.Column(scale=2):
                image = gr.Image(
                    type='filepath',
                    format='png',
                    interactive=False,
                    show_label=False,
                    buttons=['download', 'fullscreen'],
                )
                timing = gr.Markdown(elem_classes='timing')

    def run(*values):
        messages = [''] * len(tab.fields)
        try:
            picture = tab.make(**dict(zip(tab.fields, values, strict=True)))
        except FieldError as error:
            message = f'<span role="alert" style="color:#b00">{html.escape(str(error))}'
            messages[tab.fields.index(error.field)] = f'{message}</span>'
            return gr.skip(), gr.skip(), *messages
        return studio.save(picture), picture.timing(), *messages

    # While a slider moves, only the latest value is drawn.
    changes = [part.change for part in inputs]
    outputs = [image, timing, *errors]
    gr.on(
        [button.click, *changes],
        run,
        inputs,
        outputs,
        concurrency_id='model',
        trigger_mode='always_last',
        api_name=False,
        show_progress='minimal',
    )
    return run, inputs, outputs


def make_page(studio: Studio):
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    with gr.Blocks(title='ism_jax', analytics_enabled=False) as page:
        gr.Markdown(
            f'# One network, any number of steps\n{html.escape(repr(studio.model))}. '
            'Downloaded pictures hold their settings as metadata.'
        )
        first, *_ = [add_tab(studio, tab) for tab in make_tabs(studio)]
        page.load(*first, concurrency_id='model', api_name=False)
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def check_host(host: str, share_host: bool) -> None:
    """Refuses to serve other machines unintentionally.

    Raises:
      ValueError: the address is not this machine's own, and `share_host` is False.
    """
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == 'localhost'
    if not local and not share_host:
        raise ValueError(
            f'--host {host} lets other machines use this one; add --share-host to '
            'allow that, or use the default 127.0.0.1'
        )


def run_flags() -> None:
    """Runs the command."""
    check_host(FLAGS.host, FLAGS['share-host'].value)
    # Otherwise Gradio contacts its servers when it is imported.
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError('the page needs Gradio: pip install gradio') from error
    studio = Studio(generator.load(FLAGS.workdir, FLAGS.step))
    print(f'{studio.model}\ncompiling', flush=True)
    studio.warm_up()
    # In the background, so that the first picture does not wait for it.
    threading.Thread(target=studio.warm_up_more, daemon=True).start()
    make_page(studio).launch(
        server_name=FLAGS.host,
        server_port=FLAGS.port,
        share=False,
        max_threads=8,
        allowed_paths=[str(studio.folder)],
        max_file_size='1kb',
        ssr_mode=False,
        # Local fonts: the default ones are fetched from another server.
        theme=gr.themes.Default(font='system-ui', font_mono='monospace'),
        footer_links=[],
        css=CSS,
    )


if __name__ == '__main__':
    FLAGS = flags.FLAGS
    flags.DEFINE_string('workdir', None, 'Run, export or hub id.', required=True)
    flags.DEFINE_integer('step', None, 'Checkpoint; the latest by default.')
    flags.DEFINE_string('host', '127.0.0.1', 'Address to listen on.')
    flags.DEFINE_integer('port', 7860, 'Port to listen on.', 1, 65535)
    flags.DEFINE_bool('share-host', False, 'Serve other machines too.')
    command_line.run(run_flags)
