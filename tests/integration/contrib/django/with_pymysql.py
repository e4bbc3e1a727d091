"""The example's settings, with PyMySQL in the place of mysqlclient, which has to be compiled."""

from __future__ import annotations

import pymysql

pymysql.version_info = (2, 2, 7, "final", 0)  # what Django asks of mysqlclient
pymysql.install_as_MySQLdb()

from project.settings import *  # noqa: E402, F403
