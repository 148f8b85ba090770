"""Adversarial texts: `Tokenizer` compares the two encoder libraries on them.

They cover what patterns and regular-expression engines read differently (line ends before the end
of the text, long digits, contractions in capitals, spaces of all kinds), bytes that no token spans,
and every part of Unicode.
"""

from __future__ import annotations

import unicodedata
from functools import cache

SPACES = "".join(
    chr(c)
    for c in (
        0x20,
        0x09,
        0x0A,
        0x0B,
        0x0C,
        0x0D,
        0x85,
        0xA0,
        0x1680,
        0x2003,
        0x2028,
        0x2029,
        0x202F,
        0x3000,
        0x200B,
    )
)
TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "a",
    " a",
    "a ",
    "  a",
    "a  ",
    "  a  b   c    d",
    "a\n",
    "a\n\n",
    "a \n",
    "a\n ",
    "\n a",
    "a\r\nb\r\n\r\nc\n\r",
    "x = 1;\r\n    y = 2;\r\n\r\n\r\n",
    " \n \n  \n\t\n x",
    "\t\t\tif x:\n\t\t\t\treturn\n",
    "end  \n",
    "end\n  ",
    "\n\n\nend\n\n\n",
    "I'm you're he'll we've she'd it's don't",
    "I'M YOU'RE HE'LL WE'VE SHE'D IT'S DON'T",
    "I\u2019m it\u2019s",
    "'s",
    "''s'S'\u017f'T't",
    "o'clock 'tis",
    "1",
    "12",
    "123",
    "1234",
    "12345678901234567890",
    "3.14159e-10",
    " 1 22 333 4444",
    "a1b22c333",
    "\u0661\u0662\u0663\u0664",
    "\u2460\u00bd\u2167\u4e00",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?",
    "----------------",
    "a--b",
    "...",
    "... \n",
    "//comment\n///doc\n/",
    "<<<>>>",
    "((()))\n\n",
    "?!\r\n\r\n!",
    "CamelCaseHTTPServer snake_case kebab-case SCREAMING",
    "aA Aa AAa aAA \u01c5\u01c8 \u00aa\u00ba \u02b0",
    "na\u00efve cafe\u0301 A\u030a \u212b \ufb01 \u1e9b\u0323",
    "e\u0301\u0302\u0303\u0304",
    "\u0301a",
    " \u0301",
    "a \u0301b",
    "1\u0301",
    "!\u0301",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u30fc",
    "\uac00\u1100\u1161\u11a8",
    "\U0001f600",
    (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea"
        " \U0001f44d\U0001f3fd \u2764\ufe0f"
    ),
    "a\u200db\u200cc\u200bd\u2060e\ufefff",
    "\ufeffBOM",
    "\ufffd\ufffe\uffff\U0010ffff",
    "\ue000\U000f0000\U00100000",
    "\U0001d400\U0001d7ce\U00020000\U000e0001",
    "\x01\x02\x1b[31m\x7f\x80\x9f",
    SPACES,
    "a".join(SPACES) + "a",
    "".join(s + s + "1" for s in SPACES),
    "\n".join(SPACES),
    " " + " ".join(SPACES) + "!",
    " " * 100,
    " " * 1000 + "x",
    "\n" * 300,
    "\r\n" * 200,
    "\t" * 99 + "y",
    " \t" * 200,
    "a" * 500,
    "ab" * 300,
    "=" * 400,
    "\u4e2d" * 100,
    "\U0001f600" * 60,
    "0" * 100,
    "https://example.com/a%20b?q=1&r=[x]#frag",
    '{"k": [1, 2, {"n": null}], "s": "\\u00e9"}',
    "def f(x):\n    return x ** 2  # done\n\n\nclass A:\n    pass\n",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<s>x</s>",
    "[CLS] a [SEP]",
    "<unk>[UNK]<pad>",
    "<|im_start|>user<|im_end|>",
    "\u2581\u2581a\u2581",
    "##ing",
    "<0x0A>",
    "\u0120\u010a\u00e2",
)


@cache
def adversarial_texts() -> tuple[str, ...]:
    """The texts above, and samples of all of Unicode.

    Samples are taken where the category changes, and at every 16th code point of the planes in use.
    """
    return TEXTS + _unicode_samples()


def _unicode_samples() -> tuple[str, ...]:
    chosen, before = [], ""
    for code in range(0x32000):
        category = unicodedata.category(chr(code))
        if category != "Cs" and (category != before or code % 16 == 0):
            chosen.append(chr(code))
        before = category
    return tuple(
        joint.join(chosen[i : i + 512])
        for i in range(0, len(chosen), 512)
        for joint in ("", " ", "a")
    )
