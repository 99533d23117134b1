"""The page of modules says what is there."""

from scripts.commands import module_map


def test_every_module_is_on_the_page_in_its_own_words() -> None:
    assert module_map.PAGE.read_text() == module_map.page()
