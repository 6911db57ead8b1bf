//! Datagrams in batches: one system call reads up to 32 queries, one sends their answers.
//!
//! On a wildcard socket each answer leaves from the address its query was sent to (IP_PKTINFO), because a client on another
//! path would otherwise see a reply from a stranger.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

/// Messages per system call. 32 take the cost of the call below a tenth of that of an answer.
pub(crate) const BATCH: usize = 32;
/// Longer queries are cut and then rejected as malformed; real ones have some hundred octets at most.
const MAX_QUERY: usize = 2048;
/// Room for one pktinfo control message of either family.
const CONTROL: usize = 64;

/// Makes a non-blocking UDP socket that shares its address with the other workers' sockets.
pub(crate) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if address.ip().is_unspecified() {
        let (level, name) = match address {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_PKTINFO),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        };
        set_option(socket.as_raw_fd(), level, name)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn set_option(fd: RawFd, level: i32, name: i32) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option value is a live c_int and its size is passed along.
    let result = unsafe { libc::setsockopt(fd, level, name, (&raw const on).cast(), size_of::<libc::c_int>() as u32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Who sent a query and which address of ours it was sent to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    pub address: SocketAddr,
    /// Known on wildcard sockets.
    pub local: Option<IpAddr>,
}

/// Aligned room for control messages.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Buffers for one read.
pub(crate) struct Received {
    data: Box<[[u8; MAX_QUERY]; BATCH]>,
    names: Box<[SockAddrStorage; BATCH]>,
    control: Box<[Control; BATCH]>,
    lengths: [usize; BATCH],
    peers: [Option<Peer>; BATCH],
    count: usize,
}

impl Received {
    pub(crate) fn new() -> Received {
        Received {
            data: Box::new([[0; MAX_QUERY]; BATCH]),
            names: Box::new(std::array::from_fn(|_| SockAddrStorage::zeroed())),
            control: Box::new([Control([0; CONTROL]); BATCH]),
            lengths: [0; BATCH],
            peers: [None; BATCH],
            count: 0,
        }
    }

    /// The messages of the last read.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], Peer)> {
        (0..self.count).filter_map(|i| Some((&self.data[i][..self.lengths[i]], self.peers[i]?)))
    }

    /// Reads what has arrived, at most a batch; does not wait.
    pub(crate) fn read(&mut self, socket: &impl AsRawFd) -> io::Result<usize> {
        self.count = 0;
        // SAFETY: an all-zero iovec or mmsghdr is a valid value of these plain C structures.
        let (mut parts, mut headers): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) = unsafe { (zeroed(), zeroed()) };
        for i in 0..BATCH {
            parts[i] = libc::iovec { iov_base: self.data[i].as_mut_ptr().cast(), iov_len: MAX_QUERY };
            let header = &mut headers[i].msg_hdr;
            header.msg_name = (&raw mut self.names[i]).cast();
            header.msg_namelen = self.names[i].size_of();
            header.msg_iov = &raw mut parts[i];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.control[i]).cast();
            header.msg_controllen = CONTROL;
        }
        // SAFETY: each header points to buffers of the stated lengths that outlive the call.
        let got = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        self.count = got as usize;
        for (i, header) in headers[..self.count].iter().enumerate() {
            self.lengths[i] = (header.msg_len as usize).min(MAX_QUERY);
            let mut storage = SockAddrStorage::zeroed();
            std::mem::swap(&mut storage, &mut self.names[i]);
            // SAFETY: the kernel wrote an address of this length into the storage.
            let name = unsafe { SockAddr::new(storage, header.msg_hdr.msg_namelen) };
            self.peers[i] = name.as_socket().map(|address| Peer { address, local: local_address(&header.msg_hdr) });
        }
        Ok(self.count)
    }
}

/// The destination address of a received message, from its control messages.
fn local_address(header: &libc::msghdr) -> Option<IpAddr> {
    // SAFETY: the header was filled by recvmmsg and its control buffer is still alive; the CMSG functions stay within it. The
    // data is read unaligned because control data has no alignment of its own.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while let Some(control) = message.as_ref() {
            let data = libc::CMSG_DATA(control);
            match (control.cmsg_level, control.cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info: libc::in_pktinfo = std::ptr::read_unaligned(data.cast());
                    return Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info: libc::in6_pktinfo = std::ptr::read_unaligned(data.cast());
                    return Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
                }
                _ => message = libc::CMSG_NXTHDR(header, control),
            }
        }
    }
    None
}

/// Sends messages, each to its peer and from the address the peer wrote to. What the kernel does not take is dropped, as the
/// network might; the client asks again.
pub(crate) fn send(socket: &impl AsRawFd, messages: &[(Peer, Vec<u8>)]) {
    for batch in messages.chunks(BATCH) {
        // SAFETY: an all-zero iovec or mmsghdr is a valid value of these plain C structures.
        let (mut parts, mut headers): ([libc::iovec; BATCH], [libc::mmsghdr; BATCH]) = unsafe { (zeroed(), zeroed()) };
        let names: Vec<SockAddr> = batch.iter().map(|(peer, _)| peer.address.into()).collect();
        let mut control = [Control([0; CONTROL]); BATCH];
        for (i, (peer, message)) in batch.iter().enumerate() {
            parts[i] = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
            let header = &mut headers[i].msg_hdr;
            header.msg_name = names[i].as_ptr().cast_mut().cast();
            header.msg_namelen = names[i].len();
            header.msg_iov = &raw mut parts[i];
            header.msg_iovlen = 1;
            if let Some(local) = peer.local {
                header.msg_control = (&raw mut control[i]).cast();
                header.msg_controllen = CONTROL;
                header.msg_controllen = write_source(header, local);
            }
        }
        let mut done = 0;
        while done < batch.len() {
            let left = (batch.len() - done) as u32;
            // SAFETY: the headers from `done` on point to live names, buffers and control messages.
            let sent =
                unsafe { libc::sendmmsg(socket.as_raw_fd(), headers[done..].as_mut_ptr(), left, libc::MSG_DONTWAIT) };
            match usize::try_from(sent) {
                Ok(n) if n > 0 => done += n,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::WouldBlock {
                        return;
                    }
                    // The error concerns the first message (no route, or a firewall); the others may still go.
                    tracing::trace!(%error, "cannot send an answer");
                    done += 1;
                }
            }
        }
    }
}

/// Writes the control message that sets the source address; returns the length of the control data.
fn write_source(header: &libc::msghdr, local: IpAddr) -> usize {
    // SAFETY: the header's control buffer has CONTROL octets, more than either control message needs, and is aligned.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(header);
        match local {
            IpAddr::V4(a) => {
                let mut info: libc::in_pktinfo = zeroed();
                info.ipi_spec_dst.s_addr = u32::from(a).to_be();
                (*message).cmsg_level = libc::IPPROTO_IP;
                (*message).cmsg_type = libc::IP_PKTINFO;
                (*message).cmsg_len = libc::CMSG_LEN(size_of::<libc::in_pktinfo>() as u32) as usize;
                std::ptr::write_unaligned(libc::CMSG_DATA(message).cast(), info);
                libc::CMSG_SPACE(size_of::<libc::in_pktinfo>() as u32) as usize
            }
            IpAddr::V6(a) => {
                let mut info: libc::in6_pktinfo = zeroed();
                info.ipi6_addr.s6_addr = a.octets();
                (*message).cmsg_level = libc::IPPROTO_IPV6;
                (*message).cmsg_type = libc::IPV6_PKTINFO;
                (*message).cmsg_len = libc::CMSG_LEN(size_of::<libc::in6_pktinfo>() as u32) as usize;
                std::ptr::write_unaligned(libc::CMSG_DATA(message).cast(), info);
                libc::CMSG_SPACE(size_of::<libc::in6_pktinfo>() as u32) as usize
            }
        }
    }
}
