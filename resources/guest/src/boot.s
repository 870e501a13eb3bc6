# The privileged stub: everything this kernel runs at CPL0.
#
# Boot (PVH, 32 bit) -> long mode -> CPL3 Rust; the AP trampoline; one service gate (#UD), eight timer
# interrupts, fault reports. It is short on purpose: some hosts emulate CPL0 one instruction at a time
# (about 0.6 us each, and none of SSE), while CPL3 runs natively. Hence no loops, no stack frames, static
# page tables. Vectors all lead to CPL0 interrupt gates, whatever the CPU was doing: an interrupt that
# hits `sti; hlt` below may not enter a CPL3 handler, and CPL3 cannot set IF again by iretq at IOPL 0.

.set CPUS, 8
.set TASK_STATES, 0x107100          # asserted in link.ld
.set TSS_BYTES, 0x68
.set BITMAP_BYTES, 0x2000
.set K0_STACK_BYTES, 0x1000
.set K3_STACK_BYTES, 0x8000
.set SERVICE_MAGIC, 0x554d4252      # the same number in cpu.rs
.set TRAMPOLINE, 0x8000             # the same number in cpu.rs

# The PVH note (xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY = 18): where to enter in 32-bit mode.
.section .note.pvh,"a",@note
.balign 4
.long 4, 4, 18
.asciz "Xen"
.long pvh_entry

# --- Tables ------------------------------------------------------------------------------------------
# Identity map of 0..4 GiB in 2 MiB pages, all user and writable; the last GiB (LAPIC, devices) uncached.
# RAM above 4 GiB is mapped later by Rust, which can: these tables are in memory it may write.
.section .tables,"aw"
pml4:
    .quad page_directories_table + 7
    .fill 511, 8, 0
.globl page_directories_table
page_directories_table:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
.set i, 0
.rept 1536
    .quad (i << 21) + 0x87
    .set i, i + 1
.endr
.rept 512
    .quad (i << 21) + 0x97
    .set i, i + 1
.endr

# Selectors as Linux numbers them: hosts that run CPL3 natively show their own in `mov ax, cs`.
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff        # 0x10 kernel code
    .quad 0x00cf93000000ffff        # 0x18 kernel data
    .quad 0
    .quad 0x00cff3000000ffff        # 0x28 user data (0x2b)
    .quad 0x00affb000000ffff        # 0x30 user code (0x33)
    .quad 0
.set i, 0
.rept CPUS                          # 0x40 + 16 * cpu: one TSS per CPU
.set base, TASK_STATES + i * TSS_BYTES
    .quad ((CPUS - i) * TSS_BYTES + BITMAP_BYTES) | ((base & 0xffffff) << 16) | (0x89 << 40) | ((base >> 24) << 56)
    .quad 0
    .set i, i + 1
.endr
gdt_end:

# Eight TSSs in a row share the one I/O permission bitmap behind them: each points past its successors.
# The bitmap is all zeros, so CPL3 may use every port; IOPL is not relied on (some hosts keep it at 0).
.balign 0x100
.globl task_states
task_states:
.set i, 0
.rept CPUS
    .long 0
    .quad k0_stacks + (i + 1) * K0_STACK_BYTES
    .fill 11, 8, 0
    .word 0, (CPUS - i) * TSS_BYTES
    .set i, i + 1
.endr
    .fill BITMAP_BYTES, 1, 0
    .byte 0xff                      # SDM vol. 1, I/O Permission Bit Map: a byte of ones must follow

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 0xfff
    .quad IDT

.section .bss
.balign 4096
k0_stacks:
    .skip CPUS * K0_STACK_BYTES
k3_stacks:
    .skip CPUS * K3_STACK_BYTES
    .skip K3_STACK_BYTES
fault_stack_top:

# --- Into long mode ----------------------------------------------------------------------------------
.section .text.boot,"ax"
.code32
.globl pvh_entry
pvh_entry:                          # ebx = hvm_start_info, flat 32-bit segments, paging off
    cli
    cld
    mov edi, ebx
    xor esi, esi
    mov eax, 0x620                  # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER.LME
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80050033             # PG, AM, WP, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                      # far jump 0x10:long_mode
    .long long_mode
    .word 0x10

# Copied to TRAMPOLINE; an AP arrives here from SIPI in real mode and goes straight to long mode.
.balign 8
.globl trampoline
trampoline:
.code16
    jmp 1f
.balign 8
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
.balign 8
1:  cli
    cld
    xor ax, ax
    mov ds, ax
    lgdt [TRAMPOLINE + 8]           # trampoline_gdt
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80050033
    mov cr0, eax
    .byte 0x66, 0xea                # far jump 0x10:ap_long_mode
    .long ap_long_mode
    .word 0x10
.globl trampoline_end
trampoline_end:

.code64
ap_long_mode:
    xor edi, edi
    mov esi, [AP_CPU]
long_mode:                          # edi = hvm_start_info or 0, esi = cpu
    mov eax, 0x18
    mov ss, ax
    mov eax, 0x2b
    mov ds, ax
    mov es, ax
    mov fs, ax
    mov gs, ax
    lea eax, [rsi + 1]
    shl eax, 12                     # K0_STACK_BYTES
    lea rsp, [rax + k0_stacks]
    mov eax, esi
    shl eax, 4
    add eax, 0x40
    ltr ax
    lidt [idt_pointer]
    fninit
    xor eax, eax
    cpuid
    cmp eax, 7
    jb 1f
    mov eax, 7
    xor ecx, ecx
    cpuid
    test ebx, 1                     # FSGSBASE: lets CPL3 keep a pattern in fs and gs
    jz 1f
    mov rax, cr4
    or eax, 0x10000
    mov cr4, rax
1:  push 0x2b
    lea eax, [rsi + 1]
    shl eax, 15                     # K3_STACK_BYTES
    lea rax, [rax + k3_stacks]
    push rax
    push 2                          # IF = 0: the first interrupt comes when Rust asks for it
    push 0x33
    lea rax, [rip + ring3]
    push rax
    xor ebp, ebp
    iretq
ring3:
    call ring3_main                 # (start_info, cpu) -> never
    ud2

# --- Services ----------------------------------------------------------------------------------------
# `ud2` at CPL3 with r11d = SERVICE_MAGIC; eax = number, rdi, rsi, r8 = arguments, rax = result, rcx and rdx
# lost. ud2 and not int: `int n` is #UD on some hosts, and a fault leaves RIP on the instruction, so a vCPU
# stopped between the fault and its delivery asks again and nothing is lost.
.balign 16
.globl service_gate
service_gate:
    cmp r11d, SERVICE_MAGIC
    jne 9f
    add qword ptr [rsp], 2
    dec eax
    jz 1f
    dec eax
    jz 2f
    dec eax
    jz 3f
    dec eax
    jz 4f
    dec eax
    jz 5f
    dec eax
    jz 6f
    iretq
1:  mov ecx, edi                    # 1: read MSR edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    iretq
2:  mov ecx, edi                    # 2: write MSR edi = rsi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq
3:  cmp [rsi], rdi                  # 3: halt until an interrupt, unless [rsi] is no longer rdi.
    jne 31f                         #    IF is 0 here, so a tick cannot slip in between looking and halting.
    sti
    hlt
    cli
31: iretq
4:  push rbx                        # 4: cpuid edi, esi -> [r8]
    mov eax, edi
    mov ecx, esi
    cpuid
    mov [r8], eax
    mov [r8 + 4], ebx
    mov [r8 + 8], ecx
    mov [r8 + 12], edx
    pop rbx
    iretq
5:  or qword ptr [rsp + 16], 0x200  # 5: interrupts on
    iretq
6:  mov rax, cr4                    # 6: CR4.OSXSAVE on, XCR0 = edi
    or eax, 0x40000
    mov cr4, rax
    mov eax, edi
    xor edx, edx
    xor ecx, ecx
    xsetbv
    iretq
9:  push 0                          # a genuine #UD
    push 6
    jmp fault

# --- Interrupts --------------------------------------------------------------------------------------
# One timer vector per CPU, so that the handler knows its counter without a per-CPU register.
.set i, 0
.rept CPUS
.balign 32
.if i == 0
.globl timer_gates
timer_gates:
.endif
    inc qword ptr [TICKS + i * 64]
    push rax
    mov eax, 0xfee000b0             # EOI
    mov dword ptr [rax], 0
    pop rax
    iretq
    .set i, i + 1
.endr

# All devices interrupt CPU 0. Its timer's counter goes up as well, for that is what it sleeps on.
.balign 16
.globl device_gate
device_gate:
    inc qword ptr [DEVICE_INTERRUPTS]
    inc qword ptr [TICKS]
    push rax
    mov eax, 0xfee000b0             # EOI
    mov dword ptr [rax], 0
    pop rax
    iretq

.balign 16
.globl ignore_gate
ignore_gate:                        # spurious: no EOI
    iretq

# --- Faults ------------------------------------------------------------------------------------------
# Nothing here ever faults on purpose, so a fault is corruption (or a bug). Note it and go back to CPL3,
# on a fresh stack, to say so.
.set i, 0
.rept 32
.balign 16
.if i == 0
.globl fault_gates
fault_gates:
.endif
.if i == 8 || i == 10 || i == 11 || i == 12 || i == 13 || i == 14 || i == 17 || i == 21 || i == 29 || i == 30
.else
    push 0
.endif
    push i
    jmp fault
    .set i, i + 1
.endr
fault:
    pop rax
    mov [FAULT], rax
    pop rax
    mov [FAULT + 8], rax
    mov rax, [rsp]
    mov [FAULT + 16], rax
    mov rax, [rsp + 24]
    mov [FAULT + 24], rax
    mov rax, cr2
    mov [FAULT + 32], rax
    lea rax, [rip + ring3_fault]
    mov [rsp], rax
    mov qword ptr [rsp + 8], 0x33
    mov qword ptr [rsp + 16], 2
    lea rax, [fault_stack_top]
    mov [rsp + 24], rax
    mov qword ptr [rsp + 32], 0x2b
    iretq
ring3_fault:
    call report_fault
    ud2
