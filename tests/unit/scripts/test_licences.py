"""The third-party notices list every package installed at run time. None has the GPL or AGPL."""

from __future__ import annotations

import pytest

from scripts.docs import licences


def test_every_pinned_package_is_listed_with_its_sets() -> None:
    listed = {package: sets for package, (_, sets) in licences.listed().items()}
    assert listed == {package: ", ".join(sets) for package, sets in licences.pinned().items()}


@pytest.mark.parametrize("package", sorted(set(licences.pinned()) - set(licences.ELSEWHERE)))
def test_the_licence_is_that_of_the_installed_package(package: str) -> None:
    stated = licences.licence(package)
    assert stated == licences.listed()[package][0]
    assert not licences.STRONG_COPYLEFT.search(stated)


@pytest.mark.parametrize("licence", ["GPL-3.0-only", "AGPLv3", "GNU Affero General Public License v3"])
def test_strong_copyleft_is_recognised(licence: str) -> None:
    assert licences.STRONG_COPYLEFT.search(licence)


@pytest.mark.parametrize("licence", ["LGPL-2.1", "MPL-2.0", "MIT", "BSD-3-Clause"])
def test_other_licences_are_not_strong_copyleft(licence: str) -> None:
    assert not licences.STRONG_COPYLEFT.search(licence)
