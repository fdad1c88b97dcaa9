//! The description of a virtual appliance: OVF 1.1, as importers read it.
//!
//! Elements have no prefix and attributes have `ovf:`, the order of a resource's elements is that of CIM's
//! schema (the alphabet's), and the disk's capacity is whole GiB: importers exist that look for just these
//! names, that validate the order, and that take any number for GiB.

/// A machine with one disk.
#[derive(Clone, Copy, Debug)]
pub struct Appliance<'a> {
    /// Its name.
    pub name: &'a str,
    /// The name of the disk's file, a stream-optimized VMDK.
    pub file: &'a str,
    /// Bytes of that file.
    pub file_size: u64,
    /// The disk's capacity in GiB.
    pub capacity: u64,
    /// What the file really holds, in bytes.
    pub populated: u64,
    /// Memory in MiB.
    pub memory: u64,
    /// Virtual processors.
    pub processors: u32,
    /// `ID` of os-release(5), as far as it is known.
    pub distribution: &'a str,
}

/// The operating system in CIM's numbers (CIM_OperatingSystem.OSType), each for 64 bits.
fn operating_system(distribution: &str) -> (u32, &'static str) {
    match distribution {
        "debian" => (96, "Debian GNU/Linux 64-bit"),
        "ubuntu" => (94, "Ubuntu 64-bit"),
        "rhel" => (80, "Red Hat Enterprise Linux 64-bit"),
        "centos" => (107, "CentOS 64-bit"),
        _ => (101, "Linux 64-bit"),
    }
}

/// The description's XML.
#[must_use]
pub fn describe(appliance: &Appliance<'_>) -> String {
    let Appliance { file_size, capacity, populated, memory, processors, .. } = appliance;
    let (name, file) = (escaped(appliance.name), escaped(appliance.file));
    let (system, system_name) = operating_system(appliance.distribution);
    format!(
        r#"<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:href="{file}" ovf:id="file1" ovf:size="{file_size}"/>
  </References>
  <DiskSection>
    <Info>The disks of the machine</Info>
    <Disk ovf:capacity="{capacity}" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="disk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized" ovf:populatedSize="{populated}"/>
  </DiskSection>
  <NetworkSection>
    <Info>The networks of the machine</Info>
    <Network ovf:name="default">
      <Description>The network of its only card</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id="{name}">
    <Info>A virtual machine</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="{system}">
      <Info>The operating system</Info>
      <Description>{system_name}</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>What the machine needs</Info>
      <System>
        <vssd:ElementName>Virtual hardware</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Virtual processors</rasd:Description>
        <rasd:ElementName>{processors} virtual processors</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{processors}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory</rasd:Description>
        <rasd:ElementName>{memory} MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{memory}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SATA controller</rasd:Description>
        <rasd:ElementName>sata0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>AHCI</rasd:ResourceSubType>
        <rasd:ResourceType>20</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:Description>Disk</rasd:Description>
        <rasd:ElementName>disk1</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/disk1</rasd:HostResource>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>1</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>default</rasd:Connection>
        <rasd:Description>Network card</rasd:Description>
        <rasd:ElementName>ethernet0</rasd:ElementName>
        <rasd:InstanceID>5</rasd:InstanceID>
        <rasd:ResourceSubType>E1000</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
"#
    )
}

/// The manifest beside the description: a digest of each file.
#[must_use]
pub fn digests(files: &[(&str, &str)]) -> String {
    files.iter().map(|(name, sha256)| format!("SHA256({name})= {sha256}\n")).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described() -> String {
        describe(&Appliance {
            name: "debian-12",
            file: "debian-12-disk1.vmdk",
            file_size: 1234,
            capacity: 2,
            populated: 5678,
            memory: 1024,
            processors: 2,
            distribution: "debian",
        })
    }

    #[test]
    fn every_resource_has_its_elements_in_the_schemas_order() {
        let text = described();
        let mut items = 0;
        for item in text.split("<Item>").skip(1) {
            let item = item.split("</Item>").next().unwrap();
            let names: Vec<&str> =
                item.split("<rasd:").skip(1).map(|element| element.split('>').next().unwrap()).collect();
            let mut sorted = names.clone();
            sorted.sort_unstable();
            assert_eq!(names, sorted);
            for wanted in ["ElementName", "InstanceID", "ResourceType"] {
                assert!(names.contains(&wanted), "{wanted} in {names:?}");
            }
            items += 1;
        }
        assert_eq!(items, 5);
    }

    #[test]
    fn disk_and_file_are_tied_together() {
        let text = described();
        for part in [
            "ovf:href=\"debian-12-disk1.vmdk\" ovf:id=\"file1\" ovf:size=\"1234\"",
            "ovf:capacity=\"2\" ovf:capacityAllocationUnits=\"byte * 2^30\" ovf:diskId=\"disk1\" ovf:fileRef=\"file1\"",
            "<rasd:HostResource>ovf:/disk/disk1</rasd:HostResource>",
            "<OperatingSystemSection ovf:id=\"96\">",
        ] {
            assert!(text.contains(part), "{part}");
        }
    }

    #[test]
    fn digests_are_written_as_importers_check_them() {
        assert_eq!(digests(&[("x.ovf", "ab"), ("y", "cd")]), "SHA256(x.ovf)= ab\nSHA256(y)= cd\n");
    }
}
