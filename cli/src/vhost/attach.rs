//! What QEMU's command line and libvirt's domain XML need for a vhost-user-blk disk.
//!
//! Called by `vhost`. Pure. Must not know how an export is started. Sources: QEMU's manual, "vhost-user back ends" and
//! `-chardev socket`; libvirt's "Domain XML format", disk type `vhostuser`.

use std::path::Path;

/// Seconds between QEMU's attempts to reach an export that is away: the least that it knows.
const RECONNECT_SECONDS: u32 = 1;

/// A disk to attach.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// The volume; names the disk.
    pub volume: &'a str,
    /// Where nebd listens.
    pub socket: &'a Path,
    /// Queues that nebd serves.
    pub queues: u16,
}

impl Disk<'_> {
    /// QEMU's arguments.
    pub fn qemu(&self) -> Vec<String> {
        let (id, queues) = (self.id(), self.queues);
        // A comma ends a value, two stand for one.
        let path = self.socket.to_string_lossy().replace(',', ",,");
        vec![
            "-chardev".into(),
            format!("socket,id={id},path={path},reconnect={RECONNECT_SECONDS}"),
            "-device".into(),
            format!("vhost-user-blk-pci,chardev={id},num-queues={queues}"),
        ]
    }

    /// libvirt's element of `<devices>`; `target` names the disk in the domain, such as `vda`.
    pub fn xml(&self, target: &str) -> String {
        let (queues, target) = (self.queues, escape(target));
        let path = escape(&self.socket.to_string_lossy());
        format!(
            "<disk type='vhostuser' device='disk'>\n  <driver name='qemu' type='raw' queues='{queues}'/>\n  \
             <source type='unix' path='{path}'>\n    <reconnect enabled='yes' timeout='{RECONNECT_SECONDS}'/>\n  </source>\n  \
             <target dev='{target}' bus='virtio'/>\n</disk>\n"
        )
    }

    /// A name that QEMU takes: a letter, then letters, digits, `-`, `.`, `_`.
    fn id(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '-' };
        format!("spline-{}", self.volume.chars().map(plain).collect::<String>())
    }
}

/// QEMU's arguments for guest memory that another process can map; `SIZE` stands for the guest's.
pub fn qemu_memory() -> Vec<String> {
    let text = "-object memory-backend-memfd,id=memory,size=SIZE,share=on -machine memory-backend=memory";
    text.split(' ').map(str::to_owned).collect()
}

/// libvirt's element of `<domain>` for the same.
pub fn memory_xml() -> String {
    "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n".into()
}

/// Text as an XML attribute in single quotes.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_is_told_where_and_how() {
        let disk = Disk { volume: "vm/web", socket: Path::new("/run/a,b.sock"), queues: 4 };
        assert_eq!(
            disk.qemu(),
            [
                "-chardev",
                "socket,id=spline-vm-web,path=/run/a,,b.sock,reconnect=1",
                "-device",
                "vhost-user-blk-pci,chardev=spline-vm-web,num-queues=4"
            ]
        );
        assert!(qemu_memory().iter().any(|argument| argument.contains("share=on")));
    }

    #[test]
    fn xml_is_escaped() {
        let disk = Disk { volume: "a", socket: Path::new("/run/<'&.sock"), queues: 2 };
        let xml = disk.xml("vdb");
        assert!(xml.contains("path='/run/&lt;&apos;&amp;.sock'"), "{xml}");
        assert!(
            xml.contains("dev='vdb'") && xml.contains("queues='2'") && xml.contains("enabled='yes'"),
            "{xml}"
        );
    }
}
