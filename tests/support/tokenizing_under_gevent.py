"""Tokenises under gevent, as the API does, while another greenlet counts its turns. Prints the results as JSON.

python tests/support/tokenizing_under_gevent.py TOKENIZER_JSON
"""

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import sys  # noqa: E402

import gevent  # noqa: E402

from shared.errors import PromptRefused  # noqa: E402
from shared.jobs.request import Request, Sampling  # noqa: E402
from shared.tokenizing.client import Tokenizing  # noqa: E402
from shared.tokenizing.messages import TokenizerSource  # noqa: E402

TEMPLATE = "{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}"


def main(path: str) -> None:
    tokenizing = Tokenizing(1.5)
    turns = 0

    def count_turns() -> None:
        nonlocal turns
        while True:
            gevent.sleep(0.005)
            turns += 1

    counter = gevent.spawn(count_turns)
    short = Request("m", 1, Sampling(0.0), prompt="word word")
    slow = Request("m", 1, Sampling(0.0), messages=({"role": "user", "content": "x"},))
    slow_source = TokenizerSource(path, chat_template=TEMPLATE)
    greenlets = [gevent.spawn(tokenizing.tokenize, TokenizerSource(path), short) for _ in range(20)]
    gevent.joinall(greenlets)
    tokens = {greenlet.get().tokens for greenlet in greenlets}
    turns_before = turns
    try:
        tokenizing.tokenize(slow_source, slow)
    except PromptRefused as error:
        slow_code = error.code
    turns_of_others = turns - turns_before
    killed = gevent.spawn(tokenizing.tokenize, slow_source, slow)
    gevent.sleep(0.2)
    killed.kill()  # as when a client disconnects: the next request must not read the reply to this one
    tokens_after_kill = tokenizing.tokenize(TokenizerSource(path), short).tokens
    counter.kill()
    tokenizing.close()
    results = {
        "tokens": [*map(list, tokens)],
        "slow_code": slow_code,
        "turns_of_others": turns_of_others,
        "tokens_after_kill": list(tokens_after_kill),
    }
    print(json.dumps(results))


main(sys.argv[1])
