"""scripts/space/app.py in a real Chromium without a screen.

SPACE_SCREENSHOTS=folder keeps pictures of the page, light, dark and on a phone; that of the README:
    SPACE_SCREENSHOTS=shots pytest -n 0 tests/test_e2e_space.py -k opens
    cp shots/space.png hub_configs/cifar_resnet32_aig.fmnist_t06/
"""
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import timm
from network import DEFAULT_MODEL, load_network
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import timm_aig
from timm_aig.budget import BudgetPoint, set_budget_table

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='needs a browser: apt-get install chromium chromium-driver')

SCRIPT = Path(__file__).parent.parent.parent / 'scripts' / 'space' / 'app.py'
SHIPPED = DEFAULT_MODEL
FLAGS = [
    '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
    '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars',
    '--window-size=1280,1500']


@pytest.fixture(scope='module')
def budgeted(tmp_path_factory):
    """A folder with a model of calibrated budgets."""
    folder = tmp_path_factory.mktemp('budgeted')
    model = timm.create_model(SHIPPED, pretrained=True)
    set_budget_table(model, [BudgetPoint(.3, -6., .3, 9), BudgetPoint(.6, 0., .6, 9), BudgetPoint(.9, 6., .9, 9)])
    timm_aig.save_pretrained(model, folder)
    return folder


@pytest.fixture(scope='module')
def url(hub, budgeted, tmp_path_factory):
    """The page, served by a process of its own that takes the Hub on this machine for the Hub."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp('home')
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
           'HF_TOKEN': 'hf_alice_write', 'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1',
           'GRADIO_TEMP_DIR': str(home / 'uploads')}
    log = open(home / 'log', 'w')
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), '--port', str(port)], env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f'http://127.0.0.1:{port}/'

    def answers(_):
        assert process.poll() is None, (home / 'log').read_text()
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            return False

    WebDriverWait(None, 120).until(answers)
    yield url
    process.terminate()
    process.wait(30)
    log.close()
    shown = (home / 'log').read_text()
    assert 'Traceback' not in shown and 'hf_alice_write' not in shown, shown
    kept = [file for file in (home / 'uploads').rglob('*') if file.is_file() and file.stat().st_size]
    assert not kept


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("chromium")}']:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(60)
    yield browser
    browser.quit()


class Page:
    """What a person sees and does in the current tab."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        browser.get_log('browser')  # a page that is left complains that its connection ends
        self.wait(lambda: self.timed and self.classes)

    def wait(self, condition, seconds=30):
        return WebDriverWait(self.browser, seconds, poll_frequency=.1).until(
            lambda _: condition(), lambda: f'not so within {seconds} s; the page says: {self.text}')

    def script(self, code, *args):
        return self.browser.execute_script(code, *args)

    def get(self, selector):
        """HTML inside the first element, '' if there is none."""
        return self.script('return document.querySelector(arguments[0])?.innerHTML ?? ""', selector)

    @property
    def text(self):
        return self.script('return document.body.innerText')

    @property
    def gates(self):
        """Which blocks are drawn as running."""
        return [word == 'run' for word in re.findall(r'<b>(run|skipped)</b>', self.get('#network'))]

    @property
    def images(self):
        """The pictures shown of the image."""
        return re.findall(r'<img[^>]*>', self.get('#images'))

    @property
    def classes(self):
        return self.script('return document.querySelector("#classes")?.innerText ?? ""')

    @property
    def timed(self):
        return 'medians of' in self.get('#cost')

    @property
    def message(self):
        return self.script('return document.querySelector("#message")?.innerText.trim() ?? ""')

    @property
    def slider(self):
        return self.browser.find_element(By.CSS_SELECTOR, 'input[type=range]')

    def upload(self, path):
        self.browser.find_element(By.CSS_SELECTOR, '#upload input[type=file]').send_keys(str(path))

    def type_model(self, name):
        box = self.browser.find_element(By.CSS_SELECTOR, '#model input')
        box.send_keys(Keys.CONTROL, 'a')
        box.send_keys(name, Keys.ENTER)

    def pick(self, number):
        self.browser.find_elements(By.CSS_SELECTOR, '#samples button')[number].click()

    def size(self, width, height, mobile):
        self.browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
            width=width, height=height, deviceScaleFactor=1, mobile=mobile))

    def keep_screenshot(self, name):
        folder = os.environ.get('SPACE_SCREENSHOTS')
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            whole = self.browser.execute_cdp_cmd('Page.captureScreenshot', dict(captureBeyondViewport=True))
            with Image.open(io.BytesIO(base64.b64decode(whole['data']))) as image:
                image.convert('RGB').quantize(dither=Image.Dither.NONE).save(Path(folder, name), optimize=True)


@pytest.fixture
def page(browser, url):
    page = Page(browser, url)
    yield page
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[]))
    assert not [entry for entry in browser.get_log('browser') if entry['level'] == 'SEVERE']


def expected_gates(model, image, budget=None):
    network = load_network(model)
    run = network.run(network.tensor(image), budget)
    return (run.gates[0] > 0).tolist()


SAMPLES = sorted((SCRIPT.parent / 'examples').glob('*.png'))


def sample(number):
    with Image.open(SAMPLES[number]) as image:
        return image.copy()


def test_it_opens_with_a_sample_and_asks_no_other_server(page, url):
    assert 'T-shirt/top' in page.classes and page.gates == expected_gates(SHIPPED, sample(0))
    assert 'million' in page.get('#cost') and 'alt="sample: T-shirt"' in page.get('#images')
    assert 'class="heat"' in page.get('#heatmap') and '▸ T-shirt/top' in page.get('#heatmap')
    page.keep_screenshot('space.png')
    sent = [json.loads(entry['message'])['message'] for entry in page.browser.get_log('performance')]
    requests = [message['params'] for message in sent if message['method'] == 'Network.requestWillBeSent']
    # Chromium may still have loaded its own new tab page before this one.
    asked = [r['request']['url'] for r in requests if not r['documentURL'].startswith('chrome')]
    assert len(asked) > 5 and not [a for a in asked if not a.startswith((url, 'data:', 'blob:'))]


def test_an_upload_is_shown_and_computed(page, tmp_path):
    image = sample(9).convert('RGB').resize((280, 280))
    image.save(tmp_path / 'my boot.png')
    page.upload(tmp_path / 'my boot.png')
    page.wait(lambda: 'alt="my boot.png"' in page.get('#images') and page.timed)
    assert page.gates == expected_gates(SHIPPED, image) and 'Ankle boot' in page.classes and page.message == ''
    image = sample(1).resize((100, 100))
    image.save(tmp_path / 'second.png')  # without clearing the first
    page.upload(tmp_path / 'second.png')
    page.wait(lambda: 'alt="second.png"' in page.get('#images') and page.timed)
    assert page.gates == expected_gates(SHIPPED, image) and 'Trouser' in page.classes


def test_a_bad_upload_gets_a_message_and_changes_nothing(page, tmp_path):
    before = page.gates, page.images
    files = {'text.png': (b'not an image', 'no image that can be read'), 'none.jpg': (b'', 'empty'),
             'words.txt': (b'words', 'no image that can be read')}
    Image.new('1', (10_000, 10_000)).save(tmp_path / 'huge.png')
    files['huge.png'] = ((tmp_path / 'huge.png').read_bytes(), '100 megapixels')
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        page.upload(tmp_path / name)
        page.wait(lambda name=name: page.message.startswith(name))
        assert message in page.message and 'role="alert"' in page.get('#message')
        assert 'Traceback' not in page.text and str(tmp_path) not in page.text
    assert (page.gates, page.images) == before
    page.pick(3)
    page.wait(lambda: 'Dress' in page.get('#images'))
    assert page.message == ''


def test_an_animation_is_used_with_a_note(page, tmp_path):
    frames = [sample(7).resize((56, 56)), sample(1).resize((56, 56))]
    frames[0].save(tmp_path / 'two.gif', save_all=True, append_images=frames[1:])
    page.upload(tmp_path / 'two.gif')
    page.wait(lambda: 'the first of 2 is used' in page.message and 'two.gif' in page.get('#images'))
    assert 'role="status"' in page.get('#message') and page.gates == expected_gates(SHIPPED, frames[0])


def test_the_slider_acts_at_once(page):
    slider = load_network(SHIPPED).slider
    for key, value in ((Keys.HOME, slider.low), (Keys.END, slider.high)):
        page.slider.send_keys(key)
        page.wait(lambda value=value: page.gates == expected_gates(SHIPPED, sample(0), value), seconds=5)
        page.wait(lambda: page.timed)
    assert expected_gates(SHIPPED, sample(0), slider.low) != expected_gates(SHIPPED, sample(0), slider.high)


def test_other_models_come_from_a_folder_and_from_the_hub(page, budgeted, client):
    page.type_model(f'local-dir:{budgeted}')
    page.wait(lambda: page.slider.get_attribute('min') == '30')
    assert "percent of the static parent's MACs" in page.text
    page.slider.send_keys(Keys.HOME)
    page.wait(lambda: page.gates == expected_gates(f'local-dir:{budgeted}', sample(0), 30))
    assert 'No execution rates come with this model' in page.get('#heatmap')
    client.get("result = timm_aig.push_to_hub(make(0), 'alice/page').url")
    page.type_model('hf-hub:alice/page')
    page.wait(lambda: '9 of its 9 blocks' in page.text and len(page.gates) == 9)
    assert 'has no calibrated budgets' in page.text and '32 x 32 pixels, RGB' in page.text
    page.type_model('hf-hub:alice/nothing')
    page.wait(lambda: 'alice/nothing is not on the Hub, or not public' in page.message)
    box = page.browser.find_element(By.CSS_SELECTOR, '#model input')
    page.wait(lambda: box.get_property('value') == 'hf-hub:alice/page')  # the one before stays
    assert len(page.gates) == 9
    page.type_model(SHIPPED)
    page.wait(lambda: len(page.gates) == 15 and page.message == '')


def test_two_tabs_do_not_disturb_each_other(browser, url):
    first = browser.current_window_handle
    one, slider = Page(browser, url), load_network(SHIPPED).slider
    one.slider.send_keys(Keys.HOME)
    browser.switch_to.new_window('tab')
    second = browser.current_window_handle
    two = Page(browser, url)
    two.pick(9)
    two.slider.send_keys(Keys.END)
    two.wait(lambda: two.gates == expected_gates(SHIPPED, sample(9), slider.high))
    for number in (4, 8):  # the budget of a tab stays while the other computes
        browser.switch_to.window(first)
        one.pick(number)
        browser.switch_to.window(second)
        two.pick(number + 1)
        two.wait(lambda number=number: two.gates == expected_gates(SHIPPED, sample(number + 1), slider.high))
        browser.switch_to.window(first)
        one.wait(lambda number=number: one.gates == expected_gates(SHIPPED, sample(number), slider.low))
    browser.switch_to.window(second)
    browser.close()
    browser.switch_to.window(first)


def test_the_keyboard_alone_is_enough(page):
    def press(*keys):
        webdriver.ActionChains(page.browser).send_keys(*keys).perform()

    def focused():
        return page.script(
            'let e = document.activeElement; return e.tagName + " " + (e.type || "") + " " + '
            '(e.getAttribute("aria-label") || e.querySelector("img")?.alt || e.innerText)')

    seen = []
    while len(seen) < 40 and not any('range' in name for name in seen):
        press(Keys.TAB)
        seen.append(focused())
        if seen[-1].endswith('Ankle_boot'):
            press(Keys.ENTER)
    for name in ('Model', 'Click to upload', 'Trouser', 'Ankle_boot', 'range'):
        assert any(name in s for s in seen), (name, seen)
    page.wait(lambda: 'Ankle boot' in page.classes)
    before = page.gates
    press(Keys.HOME)
    page.wait(lambda: page.gates != before)
    outline = page.script('return getComputedStyle(document.activeElement).outlineStyle + '
                          'getComputedStyle(document.activeElement).boxShadow')
    assert outline != 'nonenone'  # where the focus is can be seen


@pytest.mark.parametrize('width', [360, 320])
def test_on_a_phone_nothing_scrolls_sideways(page, width, tmp_path):
    name = 'a_very_long_name_of_a_photograph_without_any_place_to_break_it_' * 2
    sample(0).resize((400, 60)).save(tmp_path / f'{name}.png')
    page.size(width, 800, mobile=True)
    page.wait(lambda: page.script('return document.documentElement.scrollWidth') <= width)
    page.upload(tmp_path / f'{name}.png')
    page.wait(lambda: name[:40] in page.get('#images') and page.timed)
    assert page.script('return document.documentElement.scrollWidth') <= width
    (tmp_path / f'{name}.png').write_bytes(b'')
    page.upload(tmp_path / f'{name}.png')
    page.wait(lambda: 'empty' in page.message)
    assert page.script('return document.documentElement.scrollWidth') <= width
    page.pick(0)
    page.wait(lambda: 'sample' in page.get('#images') and page.timed)
    page.keep_screenshot(f'space_{width}.png')


CONTRASTS = '''
const rgb = (text) => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text;
  c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data] }
const luminance = ([r, g, b]) => { const f = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return .2126 * f(r) + .7152 * f(g) + .0722 * f(b) }
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c[3] > 250) return c } return [255, 255, 255] }
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + .05) / (y + .05) }
const found = []
for (const e of document.querySelectorAll('.aig p, .aig h3, .aig td, .aig th, .aig li, .aig figcaption, #about p'))
  if (e.innerText.trim()) found.push([e.innerText.slice(0, 30), contrast(rgb(getComputedStyle(e).color), ground(e))])
for (const t of document.querySelectorAll('.aig li text')) {
  const box = getComputedStyle(t.previousElementSibling).fill
  const back = box === 'none' ? ground(t.closest('li')) : rgb(box)
  found.push(['block ' + t.textContent, contrast(rgb(getComputedStyle(t).fill), back)]) }
return found'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_is_legible_on_light_and_on_dark(page, browser, url, scheme):
    features = [dict(name='prefers-color-scheme', value=scheme)]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=features))
    page = Page(browser, url)
    assert page.script('return document.body.classList.contains("dark")') == (scheme == 'dark')
    red, green, blue = map(int, re.findall(r'\d+', page.script(
        'return getComputedStyle(document.body).backgroundColor'))[:3])
    assert (red + green + blue < 150) == (scheme == 'dark')
    contrasts = page.script(CONTRASTS)
    assert len(contrasts) > 150 and not [c for c in contrasts if c[1] < 4.5]  # WCAG 2.2, AA
    page.keep_screenshot(f'space_{scheme}.png')
