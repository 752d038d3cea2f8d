"""Start a reward server and call it, as another program would.

    python examples/serve_and_call.py --output runs/served [--model FOLDER_OR_HUB_ID]

Needs pip install 'inform-rm[serve]'. Without a model it serves a small random one that is made here; nothing is
downloaded. About 15 seconds on one CPU core, most of them imports of two programs.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from inform_rm import InfoRMForSequenceClassification
from inform_rm.world.backbone import train_tokenizer, write_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--model")
options = parser.parse_args()
folder: Path = options.output

if options.model is None:
    write_backbone(folder / "backbone")
    model = InfoRMForSequenceClassification.from_backbone(str(folder / "backbone"), latent_dim=8)
    model.save_pretrained(folder / "model")
    train_tokenizer().save_pretrained(folder / "model")


def call(path: str, **body: Any) -> Any:
    """Send JSON, get JSON."""
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(url + path, json.dumps(body).encode(), headers)) as answer:
        return json.load(answer)


# The server is a process of its own; port 0 takes a free one, and its first line says which.
command = [sys.executable, "-m", "inform_rm.cli", "serve", "--model", str(options.model or folder / "model")]
server = subprocess.Popen([*command, "--port", "0", "--device", "cpu"], stdout=subprocess.PIPE, text=True)
try:
    assert server.stdout is not None
    url = next(found[1] for line in server.stdout if (found := re.search(r"^serving .* at (http://\S+)$", line)))
    rows = [{"prompt": "Name a colour.", "response": response} for response in ("Blue.", "I would rather not say.")]
    print("two responses to a prompt:", call("/score", rows=rows))
    messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
    print("a conversation, as vLLM is asked:", call("/classify", messages=messages))
finally:
    server.terminate()
    server.wait()
print("the server has ended")
