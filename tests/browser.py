"""A headless Chromium for tests, driven through its DevTools protocol over two pipes.

    with Browser() as browser:
        browser.open(path, width=390, dark=True)
        browser.evaluate("document.title")
        browser.press("Tab")
"""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
            "--no-first-run", "--disable-extensions", "--disable-background-networking",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--host-resolver-rules=MAP * 0.0.0.0")
TIMEOUT = 120  # seconds
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "/": 191}


class Browser:
    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(prefix="chromium-")
        commands, self.write_end = os.pipe()
        self.read_end, answers = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        line = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, CHROMIUM, *SWITCHES, f"--user-data-dir={self.profile.name}"],
            pass_fds=(commands, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self.buffer, self.count, self.session, self.errors = b"", 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.send("Page.enable")
        self.send("Runtime.enable")
        return self

    def __exit__(self, *_):
        self.session = None
        self.send("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.write_end)
        os.close(self.read_end)
        self.profile.cleanup()

    def send(self, method, **parameters):
        """Send a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def receive(self):
        """Return the next message, and note exceptions and requests of the page."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_end], [], [], TIMEOUT)
            assert ready, f"Chromium said nothing for {TIMEOUT} seconds"
            data = os.read(self.read_end, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        first, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(first)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(message["params"]["exceptionDetails"])
        return message

    def open(self, path, width=1280, height=900, dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=f"file://{path}")
        while self.receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression):
        """Return the value of a JavaScript expression; a promise is awaited."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key, modifiers=0):
        """Press and release a key, as a person does."""
        known = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **known)

    def screenshot(self, path):
        image = self.send("Page.captureScreenshot", format="png")
        with open(path, "wb") as file:
            file.write(base64.b64decode(image["data"]))
