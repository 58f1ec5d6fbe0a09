"""What the tests of pages share: a session that was saved, and text that would do harm if it were taken for markup."""

from __future__ import annotations

import mnemic
from helpers import CONFIGS, SEGMENT, host, tokens
from mnemic.inspect.inside import Words, open_session

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--\u2028{{data}}"
)


class Spelling:
    """A tokenizer of which every seventh token is hostile, and the others are words with a space before them."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(HOSTILE if token % 7 == 5 else f" w{token}" for token in ids)


def saved(path, name="emt-0", length=9 * SEGMENT + 3, keep_text=True, seed=0, **changes):
    """The contents of a session that was saved, and the text it kept."""
    session = mnemic.Session(host("llama", CONFIGS[name].replace(**changes)), keep_text=keep_text)
    if length:
        session.read(tokens(1, length, seed))
    session.save(path)
    found = open_session(path)
    return found, Words(found.log.ids, Spelling()) if keep_text and length else None
