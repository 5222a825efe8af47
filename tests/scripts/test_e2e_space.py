"""scripts/space/app.py in a Chromium without a screen: one server and one browser for all tests.

SPACE_SCREENSHOTS=folder keeps pictures of the page. The one in the README:
    SPACE_SCREENSHOTS=shots pytest -n 0 tests/scripts/test_e2e_space.py -k first_sight
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
from loading import load_network
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import timm_aig

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason='needs a browser: apt-get install chromium chromium-driver')

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'space' / 'app.py'
SAMPLES = sorted((SCRIPT.parent / 'examples').glob('*.png'))
SHIPPED = 'cifar_resnet32_aig.fmnist_t06'
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
         '--disable-background-networking', '--disable-sync', '--hide-scrollbars', '--window-size=1366,768']


@pytest.fixture(scope='module')
def url(hub, tmp_path_factory):
    """The page, served by a process that uses the Hub double."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp('home')
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1',
           'HF_TOKEN': 'hf_alice_write', 'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_NUM_THREADS': '1',
           'GRADIO_TEMP_DIR': str(home / 'uploads')}
    url, log = f'http://127.0.0.1:{port}/', home / 'log'
    with open(log, 'w') as file:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), '--port', str(port)], env=env, stdout=file, stderr=subprocess.STDOUT)

    def answers(_):
        assert process.poll() is None, log.read_text()
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            return False

    try:
        WebDriverWait(None, 120).until(answers)
        yield url
        uploads = home / 'uploads'
        WebDriverWait(None, 60).until(
            lambda _: not [file for file in uploads.rglob('*') if file.is_file() and file.stat().st_size])
    finally:
        process.kill()
        process.wait(30)
    assert 'Traceback' not in log.read_text() and 'hf_alice_write' not in log.read_text(), log.read_text()


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("chromium")}']:
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL', 'browser': 'ALL'})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.command_executor.client_config.timeout = 60
    browser.set_page_load_timeout(60)
    yield browser
    browser.quit()


class Page:
    """What a visitor sees and does in the current tab."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        browser.get_log('browser')  # a page that is left complains that its connection ends
        self.wait(lambda: 'medians of' in self.text('#answers'))

    def wait(self, condition, seconds=60):
        try:
            return WebDriverWait(self.browser, seconds, poll_frequency=.1).until(lambda _: condition())
        except TimeoutException:
            pytest.fail(f'not so within {seconds} s; the page says: {self.text("body")}')

    def script(self, code, *args):
        return self.browser.execute_script(code, *args)

    def html(self, selector):
        return self.script('return document.querySelector(arguments[0])?.innerHTML ?? ""', selector)

    def text(self, selector):
        return self.script('return document.querySelector(arguments[0])?.innerText ?? ""', selector)

    def find(self, selector, number=0):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)[number]

    def runs(self, expected, seconds=60):
        """Wait until these blocks of the first stage are drawn as running."""
        self.wait(lambda: [word == 'run' for word in re.findall(
            r'<b>(run|skipped)</b>', self.html('#network'))] == expected, seconds)

    def upload(self, path):
        self.find('#upload input[type=file]').send_keys(str(path))

    def type_model(self, name):
        self.find('#model input').send_keys(Keys.CONTROL, 'a')
        self.find('#model input').send_keys(name, Keys.ENTER)

    def pick(self, number):
        self.find('#samples button', number).click()

    def resize(self, width, height):
        """A phone, or the browser's own window for a laptop."""
        self.browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500))

    def bottom(self, selector):
        """Distance from the top of the page to the end of an element, in pixels."""
        return self.script(
            'return document.querySelector(arguments[0]).getBoundingClientRect().bottom + window.scrollY', selector)

    def scroll_size(self):
        return self.script('const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]')

    def keep_screenshot(self, name):
        if folder := os.environ.get('SPACE_SCREENSHOTS'):
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


def expected_gates(image, value=None, model=SHIPPED):
    network = load_network(model)
    return (network.run(network.tensor(image), value).passes[0].gates[0] > 0).tolist()


def sample(number):
    with Image.open(SAMPLES[number]) as image:
        return image.copy()


def test_it_opens_with_a_sample_and_asks_no_other_server(page, url):
    page.runs(expected_gates(sample(0)))
    assert page.text('#answers').count('T-shirt/top') == 2 and 'MACs, millions' in page.text('#answers')
    assert 'alt="sample: T-shirt"' in page.html('#images') and '▸ T-shirt/top' in page.text('#heatmap')
    sent = [json.loads(entry['message'])['message'] for entry in page.browser.get_log('performance')]
    requests = [message['params'] for message in sent if message['method'] == 'Network.requestWillBeSent']
    # Chromium may still have loaded its own new tab page before this one.
    asked = [r['request']['url'] for r in requests if not r['documentURL'].startswith('chrome')]
    assert len(asked) > 5 and not [a for a in asked if not a.startswith((url, 'data:', 'blob:'))]


@pytest.mark.parametrize('name,width,height,last,length', [
    ('space.png', 1366, 768, ('curve', 'pair', 'heatmap'), 820),
    ('space_phone.png', 390, 844, ('network',), 1900),
])
def test_the_answer_the_blocks_and_the_slider_are_seen_at_first_sight(page, name, width, height, last, length):
    page.resize(width, height)
    for part in ('images', 'upload', 'samples', 'answers', 'network', 'budget', *last):
        assert 0 < page.bottom(f'#{part}') <= height, part
    across, down = page.scroll_size()
    assert across <= width and down <= length
    page.keep_screenshot(name)


def test_a_hard_image_needs_the_second_stage_and_an_easy_one_does_not(page):
    assert 'Second stage: not needed' in page.text('#answers')
    easy, hard = page.browser.find_elements(By.CSS_SELECTOR, '#pair .pair > div')
    assert 'Second stage not needed' in easy.text and 'Second stage needed' in hard.text
    page.pick([path.stem for path in SAMPLES].index('2_Pullover_hard'))
    page.wait(lambda: 'Second stage: needed' in page.text('#answers'))
    assert 'Coat' in page.text('#answers') and 'then all blocks' in page.text('#network')


def test_uploads_are_run_and_bad_ones_get_a_message_and_change_nothing(page, tmp_path):
    for number, name in ((9, 'my boot.png'), (1, 'second.png')):  # the second without clearing the first
        image = sample(number).convert('RGB').resize((280, 280))
        image.save(tmp_path / name)
        page.upload(tmp_path / name)
        page.wait(lambda name=name: f'alt="{name}"' in page.html('#images'))
        page.runs(expected_gates(image))
    (tmp_path / '<b>words.png').write_bytes(b'words')
    page.upload(tmp_path / '<b>words.png')
    page.wait(lambda: 'words.png: this is not an image' in page.text('.toast-wrap'))
    assert 'Traceback' not in page.text('body') and str(tmp_path) not in page.text('body')
    assert 'alt="second.png"' in page.html('#images')


def test_of_many_images_in_a_row_the_last_one_is_answered_and_timed(page):
    for number in range(1, len(SAMPLES)):
        page.pick(number)
    page.wait(lambda: f'alt="sample: {SAMPLES[-1].stem[2:].replace("_", " ")}"' in page.html('#images'))
    page.runs(expected_gates(sample(-1)))
    page.wait(lambda: 'Ankle boot' in page.text('#answers') and 'medians of' in page.text('#answers'))


def test_the_slider_acts_at_once_and_a_typed_number_out_of_its_range_gets_a_message(page):
    slider = load_network(SHIPPED).slider
    for key, value in ((Keys.HOME, slider.low), (Keys.END, slider.high)):
        page.find('#budget input[type=range]').send_keys(key)
        page.runs(expected_gates(sample(0), value))
        page.wait(lambda value=value: f'budget {value}%' in page.text('#curve'))
    number = page.find('#budget input[type=number]')
    number.send_keys(Keys.CONTROL, 'a')
    number.send_keys('10')
    page.wait(lambda: 'Type a number from 40 to 100, not 10. Shown: 40.' in page.text('#curve'))
    page.runs(expected_gates(sample(0), slider.low))
    number.send_keys(Keys.CONTROL, 'a', Keys.DELETE)
    page.wait(lambda: 'Type a number from 40 to 100. Shown: 60.' in page.text('#curve'))
    number.send_keys('50')
    page.wait(lambda: 'Type a number' not in page.text('#curve') and 'budget 50%' in page.text('#curve'))


def test_a_model_for_colour_images_comes_from_the_hub_without_the_grey_samples(page, client, tmp_path):
    client.get("result = timm_aig.push_to_hub(make(0), 'alice/page').url")
    page.type_model('hf-hub:alice/page')
    page.wait(lambda: '3 of 3 blocks' in page.text('#about') and 'Upload an image' in page.text('#network'))
    assert 'Gate offset' in page.text('#budget') and 'budget' not in page.text('#budget').replace('budgets', '')
    assert not page.html('#samples') and not page.text('#pair')
    Image.new('RGB', (40, 40), 'red').save(tmp_path / 'red.png')
    page.upload(tmp_path / 'red.png')
    page.wait(lambda: page.html('#network').count('<li') == 3)
    page.type_model('hf-hub:alice/nothing')
    page.wait(lambda: 'alice/nothing is not on the Hub, or not public' in page.text('.toast-wrap'))
    page.wait(lambda: page.find('#model input').get_property('value') == 'hf-hub:alice/page')  # the one before stays
    folder = timm.create_model(SHIPPED, pretrained=True)
    timm_aig.save_pretrained(folder, tmp_path / 'model')
    page.type_model(f'local-dir:{tmp_path / "model"}')
    page.wait(lambda: page.html('#network').count('<li') == 15 and page.html('#samples'))


def test_a_cascade_comes_from_the_hub(page, client, tmp_path):
    client.get("result = timm_aig.Cascade([make(0), make(1)], 1.).push_to_hub('alice/cascade')")
    page.type_model('hf-hub:alice/cascade')
    page.wait(lambda: 'Stage 2: ' in page.text('#about') and 'Gate offset' in page.text('#budget'))
    Image.new('RGB', (40, 40), 'red').save(tmp_path / 'red.png')
    page.upload(tmp_path / 'red.png')
    page.wait(lambda: 'below the threshold of 100.0%' in page.text('#answers'))
    assert page.html('#network').count('<li') == 6


def test_two_tabs_do_not_disturb_each_other(browser, url):
    first, one, slider = browser.current_window_handle, Page(browser, url), load_network(SHIPPED).slider
    one.find('#budget input[type=range]').send_keys(Keys.HOME)
    browser.switch_to.new_window('tab')
    second, two = browser.current_window_handle, Page(browser, url)
    two.find('#budget input[type=range]').send_keys(Keys.END)
    for number in (4, 8):  # the budget of a tab stays while the other computes
        for handle, page, of_tab, value in ((second, two, number + 1, slider.high), (first, one, number, slider.low)):
            browser.switch_to.window(handle)
            page.pick(of_tab)
            page.runs(expected_gates(sample(of_tab), value))
    browser.switch_to.window(second)
    browser.close()
    browser.switch_to.window(first)


def test_the_keyboard_alone_is_enough(page):
    def press(key):
        webdriver.ActionChains(page.browser).send_keys(key).perform()

    seen = []
    while len(seen) < 40 and not any('range' in name for name in seen):
        press(Keys.TAB)
        seen.append(page.script(
            'let e = document.activeElement; return e.tagName + " " + (e.type || "") + " " + '
            '(e.getAttribute("aria-label") || e.querySelector("img")?.alt || e.innerText)'))
        if seen[-1].endswith('Ankle_boot'):
            press(Keys.ENTER)
    for name in ('Model', 'Drop an image', 'camera', 'clipboard', 'Trouser', 'Ankle_boot', 'range'):
        assert any(name in s for s in seen), (name, seen)
    press(Keys.HOME)
    page.runs(expected_gates(sample(-1), load_network(SHIPPED).slider.low))
    outline = page.script('return getComputedStyle(document.activeElement).outlineStyle + '
                          'getComputedStyle(document.activeElement).boxShadow')
    assert outline != 'nonenone'  # the focus can be seen


def test_on_a_phone_nothing_scrolls_sideways(page, tmp_path):
    name = 'a_very_long_name_of_a_photograph_without_any_place_to_break_it_' * 2
    sample(0).resize((400, 60)).save(tmp_path / f'{name}.png')
    page.resize(320, 800)
    page.wait(lambda: page.scroll_size()[0] <= 320)
    page.upload(tmp_path / f'{name}.png')
    page.wait(lambda: name[:40] in page.html('#images') and 'medians of' in page.text('#answers'))
    assert page.scroll_size()[0] <= 320
    (tmp_path / f'{name}.png').write_bytes(b'')
    page.upload(tmp_path / f'{name}.png')
    page.wait(lambda: 'empty' in page.text('.toast-wrap'))
    assert page.scroll_size()[0] <= 320
    page.keep_screenshot('space_320.png')


CONTRASTS = '''
const rgb = (text) => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text;
  c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data] }
const luminance = ([r, g, b]) => { const f = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  return .2126 * f(r) + .7152 * f(g) + .0722 * f(b) }
const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c[3] > 250) return c } return [255, 255, 255] }
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + .05) / (y + .05) }
return [...document.querySelectorAll(
  '.aig :is(p, h3, b, td, th, li, figcaption), #about p, #title p')].filter((e) => e.innerText.trim()).map(
  (e) => [e.innerText.slice(0, 30), contrast(rgb(getComputedStyle(e).color), ground(e))])'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_is_legible_on_light_and_on_dark(page, browser, url, scheme):
    features = [dict(name='prefers-color-scheme', value=scheme)]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=features))
    page = Page(browser, url)
    assert page.script('return document.body.classList.contains("dark")') == (scheme == 'dark')
    contrasts = page.script(CONTRASTS)
    assert len(contrasts) > 150 and not [c for c in contrasts if c[1] < 4.5]  # WCAG 2.2, AA
    page.keep_screenshot(f'space_{scheme}.png')
