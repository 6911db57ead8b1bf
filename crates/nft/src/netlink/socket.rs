//! A blocking netlink socket with a receive timeout; shared with other users of netlink in the data plane.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// How long the kernel may take for one answer. A full first sync of a large cluster is split into commits of milliseconds;
/// a commit waits for RCU grace periods at most.
const RECEIVE_TIMEOUT_SECS: libc::time_t = 30;

/// 32 MiB: the buffer limits that hold the largest batch (the data plane splits at about 1 MiB) with its answers.
const BUFFER_BYTES: libc::c_int = 32 << 20;

/// A netlink socket bound to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens a socket for one netlink protocol.
    pub fn open(protocol: libc::c_int) -> io::Result<Socket> {
        // SAFETY: socket takes plain integers and returns a new descriptor or -1.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Socket { fd };
        let timeout = libc::timeval { tv_sec: RECEIVE_TIMEOUT_SECS, tv_usec: 0 };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)?;
        for force in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            socket.set(libc::SOL_SOCKET, force, &BUFFER_BYTES)?;
        }
        // SAFETY: an all-zero sockaddr_nl is valid; the kernel then chooses the port number.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        // SAFETY: the pointer and length describe `address`, which outlives the call.
        let bound = unsafe {
            libc::bind(
                socket.fd.as_raw_fd(),
                std::ptr::from_ref(&address).cast(),
                std::mem::size_of::<libc::sockaddr_nl>() as libc::socklen_t,
            )
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    fn set<T>(&self, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: the pointer and length describe `value`, which outlives the call.
        let set = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(value).cast(),
                std::mem::size_of::<T>() as libc::socklen_t,
            )
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The number by which the kernel names this socket, as in `nlmsg_pid` of what it announces on the socket's behalf.
    pub fn port_id(&self) -> io::Result<u32> {
        // SAFETY: an all-zero sockaddr_nl is valid.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut len = std::mem::size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: the pointers are to live variables, and `len` holds the size of the address.
        let got = unsafe { libc::getsockname(self.fd.as_raw_fd(), std::ptr::from_mut(&mut address).cast(), &mut len) };
        if got < 0 { Err(io::Error::last_os_error()) } else { Ok(address.nl_pid) }
    }

    /// Joins a multicast group, so that its notifications are received.
    pub fn join(&self, group: libc::c_int) -> io::Result<()> {
        self.set(libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, &group)
    }

    /// Leaves out what the kernel announces on behalf of the socket `port_id`, by a filter in the kernel: a flood of one's own
    /// changes then costs nothing here and cannot push out what others announce.
    pub fn ignore_sender(&self, port_id: u32) -> io::Result<()> {
        // The filter loads words as big-endian; `nlmsg_pid` (offset 12) is in the machine's own order.
        let wanted = u32::from_be_bytes(port_id.to_ne_bytes());
        let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut steps = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 12),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, wanted),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        ];
        // The kernel copies the program during the call, in which `steps` lives.
        let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
        self.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
    }

    /// Sets how long [`Socket::receive`] waits.
    pub fn set_receive_timeout(&self, timeout: std::time::Duration) -> io::Result<()> {
        let timeout = libc::timeval {
            tv_sec: timeout.as_secs() as libc::time_t,
            tv_usec: libc::suseconds_t::from(timeout.subsec_micros() as i32),
        };
        self.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &timeout)
    }

    /// Sends one datagram to the kernel.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        loop {
            // SAFETY: the pointer and length describe `bytes`.
            let sent = unsafe { libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Receives one datagram, whatever its size.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] after the timeout; `ENOBUFS` when notifications were lost.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0u8; 64 << 10];
        loop {
            // SAFETY: the pointer and length describe `buffer`; MSG_PEEK leaves the datagram for a second try with more room.
            let len = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_TRUNC | libc::MSG_PEEK,
                )
            };
            if len < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if len as usize > buffer.len() {
                buffer.resize(len as usize, 0);
                continue;
            }
            // SAFETY: as above, without MSG_PEEK, which takes the datagram out.
            let taken = unsafe { libc::recv(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if taken < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            buffer.truncate(taken as usize);
            return Ok(buffer);
        }
    }
}
