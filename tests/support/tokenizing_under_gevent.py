"""Run under gevent, as the API is: tokenises while another greenlet counts its turns, and prints what came of it.

python tests/support/tokenizing_under_gevent.py TOKENIZER_JSON
"""

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import gevent  # noqa: E402

from shared.errors import PromptRefused  # noqa: E402
from shared.jobs.request import Request, Sampling  # noqa: E402
from shared.tokenizing.client import Tokenizing  # noqa: E402
from shared.tokenizing.messages import TokenizerSource  # noqa: E402

TEMPLATE = "{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}"


def main(path: str) -> None:
    tokenizing = Tokenizing(1.5)
    turns, longest = 0, 0.0

    def others() -> None:
        nonlocal turns, longest
        while True:
            before = time.monotonic()
            gevent.sleep(0.005)
            turns, longest = turns + 1, max(longest, time.monotonic() - before)

    counting = gevent.spawn(others)
    short = Request("m", 1, Sampling(0.0), prompt="word word")
    slow = Request("m", 1, Sampling(0.0), messages=({"role": "user", "content": "x"},))
    asked = [gevent.spawn(tokenizing.tokenize, TokenizerSource(path), short) for _ in range(20)]
    gevent.joinall(asked)
    tokens = {each.get().tokens for each in asked}
    turns_before = turns
    try:
        tokenizing.tokenize(TokenizerSource(path, chat_template=TEMPLATE), slow)
    except PromptRefused as refused:
        code = refused.code
    turns_meanwhile = turns - turns_before
    leaving = gevent.spawn(tokenizing.tokenize, TokenizerSource(path, chat_template=TEMPLATE), slow)
    gevent.sleep(0.2)
    leaving.kill()  # as when a client goes away: the next must not get this one's answer
    again = tokenizing.tokenize(TokenizerSource(path), short).tokens
    counting.kill()
    tokenizing.close()
    print(json.dumps({"tokens": [*map(list, tokens)], "code": code, "turns": turns_meanwhile, "longest_s": longest,
                      "again": list(again)}))  # fmt: skip


main(sys.argv[1])
