"""Bounded memory while receiving: the data set of a C-STORE request goes to disk as its fragments arrive.

pynetdicom can write to temporary files of its own (`STORE_RECV_CHUNKED_DATASET`), but in the system's temporary folder,
by a switch for the whole process, and a full disk then breaks the connection instead of being answered with 0xA700.
Here an association gets a DIMSE provider whose messages keep their data set in the output folder.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from io import BytesIO
from typing import Any

from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, C_STORE_RSP, DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu import P_DATA_TF as PDU
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket

from medaug.pacs.head import HEAD_BYTES, file_meta, is_uid
from medaug.pacs.store import ABORTED, Incoming, Store

MAX_COMMAND_BYTES = 1 << 16  # a command set holds a few short elements (PS3.7 E)
MAX_IDENTIFIER_BYTES = 1 << 24  # the data set of any other message, such as a list of failed instances
P_DATA_TF = 0x04
MAX_TURN = 0.5  # seconds of data before the reactor has its turn
PAUSE = 0.02  # seconds to wait for the next PDU before it has
MIN_PDU_CAP = 1 << 20  # an association request with 128 contexts is far below


class Spool(BytesIO):
    """Stands where pynetdicom keeps a message's data set in memory.

    Attributes:
        head: the first bytes of the data set, enough to identify the image.
        incoming: the file; None if the command names no valid SOP instance, and then nothing is kept.
    """

    def __init__(self, store: Store, message: Any, association: Any) -> None:
        super().__init__()
        self.head = b""
        self.incoming: Incoming | None = None
        self._store, self._message, self._association = store, message, association
        self._started = False

    def write(self, data: Any) -> int:
        """Take in one fragment."""
        if not isinstance(self._message, C_STORE_RQ):
            if self.tell() + len(data) > MAX_IDENTIFIER_BYTES:
                raise ValueError("data set of a message larger than the cap")  # aborts the association
            return super().write(data)
        if not self._started:
            self._start()
        if self.incoming is not None:
            if len(self.head) < HEAD_BYTES:
                self.head += bytes(data[: HEAD_BYTES - len(self.head)])
            self.incoming.write(data)
        return len(data)

    def _start(self) -> None:
        self._started = True
        command = self._message.command_set
        sop_class, sop = (str(command.get(name, "")) for name in ("AffectedSOPClassUID", "AffectedSOPInstanceUID"))
        if is_uid(sop_class) and is_uid(sop):
            context = self._association._accepted_cx[self._message.context_id]
            self.incoming = Incoming(self._store)
            self.incoming.write(file_meta(sop_class, sop, str(context.transfer_syntax[0])))


class SpoolingProvider(DIMSEServiceProvider):
    """pynetdicom's DIMSE provider with data sets on disk and a cap on everything kept in memory."""

    def __init__(self, association: Any, store: Store) -> None:
        super().__init__(association)
        self._store = store

    def receive_primitive(self, primitive: Any) -> None:
        """Take in one P-DATA primitive (PS3.8 9.3.5)."""
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = Spool(self._store, self.message, self.assoc)
        super().receive_primitive(primitive)
        if self.message is not None and self.message.encoded_command_set.tell() > MAX_COMMAND_BYTES:
            self.forget()
            self.dul.event_queue.put("Evt19")  # invalid PDU: ends the association

    def send_msg(self, primitive: Any, context_id: int) -> None:
        """Send a message; from the thread that owns the socket at once, else through its queue."""
        if threading.current_thread() is not self.dul or not isinstance(primitive, C_STORE):
            super().send_msg(primitive, context_id)
            return
        message = C_STORE_RSP()
        message.primitive_to_message(primitive)
        message.context_id = context_id
        for data in message.encode_msg(context_id, self.maximum_pdu_size):
            self.dul._send(PDU(data))

    def forget(self) -> None:
        """Drop a message that will not be completed, with its file, and count it."""
        message, self.message = self.message, None
        incoming = getattr(getattr(message, "data_set", None), "incoming", None)
        if incoming is not None:
            incoming.discard()
            self._store.count(ABORTED)


class Carrier(AssociationSocket):
    """The association's socket: reads a PDU in few calls, and never one larger than agreed.

    An acceptor's also takes P-DATA by itself (`ready`). pynetdicom's reactor is a loop with pauses of a millisecond and several
    queues between socket and service, which cost more than the writing of an image.
    """

    cap = MIN_PDU_CAP

    def recv(self, nr_bytes: int) -> bytearray:
        """Read `nr_bytes`, less if the connection ends."""
        if nr_bytes > self.cap or self.socket is None:
            raise OSError("PDU larger than agreed")
        buffer = bytearray(nr_bytes)
        done = 0
        with memoryview(buffer) as view:
            while done < nr_bytes and (count := self.socket.recv_into(view[done:])):
                done += count
        del buffer[done:]
        return buffer

    @property
    def ready(self) -> bool:
        """True if there is a PDU for pynetdicom's state machine; data of an established association are taken in first."""
        end = time.monotonic() + MAX_TURN
        while AssociationSocket.ready.fget(self):  # type: ignore[attr-defined]
            if not (self._takes_data() and self._take_pdu()):
                return True
            if time.monotonic() > end:
                break  # the reactor has timers and a stop signal to look at
            if self.socket is not None:
                select.select([self.socket], [], [], PAUSE)
        return False

    def _takes_data(self) -> bool:
        association = self.assoc
        return association.is_acceptor and association.is_established and association.dul.state_machine.current_state == "Sta6"

    def _take_pdu(self) -> bool:
        """Take one P-DATA-TF PDU (PS3.8 9.3.5); False, with nothing read, if another one or a broken one is next."""
        assert self.socket is not None
        header = self.socket.recv(6, socket.MSG_PEEK)
        if len(header) < 6 or header[0] != P_DATA_TF:
            return False
        length = int.from_bytes(header[2:], "big")
        if length > self.cap:
            return False  # `recv` refuses it
        try:
            data = self.recv(6 + length)
        except OSError:  # stopped in the middle for longer than the timeout, or reset
            self.assoc.dul.event_queue.put("Evt17")
            return True
        primitive = P_DATA()
        position = 6
        with memoryview(data) as view:
            while position + 6 <= len(data):
                size = int.from_bytes(view[position : position + 4], "big")
                if size < 2 or position + 4 + size > len(data):
                    break
                primitive.presentation_data_value_list.append(
                    (view[position + 4], bytes(view[position + 5 : position + 4 + size]))
                )
                position += 4 + size
        if position != len(data) or len(data) != 6 + length:
            self.assoc.dul.event_queue.put("Evt19" if len(data) == 6 + length else "Evt17")  # invalid, or connection closed
            return True
        self.assoc.dimse.receive_primitive(primitive)
        self.assoc.dul._idle_timer.restart()
        return True


class _Requests(queue.Queue[Any]):
    """The queue between DIMSE provider and association; a C-STORE request is served before anybody polls for it."""

    def __init__(self, association: Any) -> None:
        super().__init__()
        self._association = association

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Serve the request, or queue the message."""
        context, message = item
        if isinstance(message, C_STORE) and message.is_valid_request:
            self._association._serve_request(message, context)
        else:
            super().put(item, block, timeout)


def attach(association: Any, store: Store, max_pdu: int, timeout: float | None) -> None:
    """Give an association a `SpoolingProvider` and a `Carrier`; `timeout` is for a peer that stops in the middle of a PDU."""
    provider = SpoolingProvider(association, store)
    if association.is_acceptor:
        provider.msg_queue = _Requests(association)
    association.dimse = provider
    carrier = association.dul.socket
    carrier.__class__ = Carrier  # made by pynetdicom before anybody can say which class to take
    carrier.cap = max(max_pdu, MIN_PDU_CAP)
    if carrier.socket is not None:
        carrier.socket.settimeout(timeout)
        carrier.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
