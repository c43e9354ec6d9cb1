"""Studies, pages, respondents, placements, votes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("cookie_key", sa.String(64), nullable=False),
        sa.Column("owner_token", sa.String(64), nullable=False),
    )
    op.create_table(
        "pages",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("repeats", sa.String(16), sa.ForeignKey("pages.id")),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("subset", sa.Text, nullable=False),
        sa.Column("expected", sa.Text),
    )
    op.create_table(
        "respondents",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("source", sa.String(9), nullable=False),
        sa.Column("submitted", sa.Boolean, nullable=False),
    )
    op.create_table(
        "placements",
        sa.Column(
            "respondent",
            sa.String(32),
            sa.ForeignKey("respondents.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("page", sa.String(16), sa.ForeignKey("pages.id"), primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("shown", sa.JSON, nullable=False),
        sa.UniqueConstraint("respondent", "position"),
    )
    op.create_table(
        "votes",
        sa.Column("respondent", sa.String(32), primary_key=True),
        sa.Column("page", sa.String(16), primary_key=True),
        sa.Column("choice", sa.Text),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.ForeignKeyConstraint(
            ["respondent", "page"], ["placements.respondent", "placements.page"], ondelete="CASCADE"
        ),
    )


def downgrade() -> None:
    for table in ("votes", "placements", "respondents", "pages", "studies"):
        op.drop_table(table)
