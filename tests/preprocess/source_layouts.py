"""Every layout of the releases that BRAINS-45K is made of: paths, ids, and what lies beside the scans."""

LONI = "2006-04-18_08_20_30.0"
CASES = [  # source, files that are volumes and their ids, left out by reason, files that match no rule
    (
        "brats21",
        """
        RSNA Data.2021/a.b/BraTS2021_00000/BraTS2021_00000_flair.nii.gz
            BraTS2021_00000/ses-1/FLAIR
        RSNA Data.2021/a.b/BraTS2021_00000/BraTS2021_00000_t1.nii.gz
            BraTS2021_00000/ses-1/T1
        RSNA Data.2021/a.b/BraTS2021_00000/BraTS2021_00000_t1ce.nii.gz
            BraTS2021_00000/ses-1/T1ce
        latest_download/BraTS2021_01666_t2.NII.GZ
            BraTS2021_01666/ses-1/T2
        """,
        {
            "label": ["RSNA Data.2021/a.b/BraTS2021_00000/BraTS2021_00000_seg.nii.gz"],
            "other_part": ["RSNA_ASNR_MICCAI_BraTS2021_ValidationData/BraTS2021_00001/BraTS2021_00001_t1.nii.gz"],
        },
        ["BraTS2021_00000/notes.nii"],
    ),
    (
        "msd_task01",
        """
        Task01_BrainTumour/imagesTs/BRATS_485.nii.gz
            BRATS_485/ses-1/{FLAIR,T1,T1ce,T2}
        split/imagesTs/BRATS_486_0002.nii.gz
            BRATS_486/ses-1/T1ce
        """,
        {
            "label": ["Task01_BrainTumour/labelsTr/BRATS_001.nii.gz"],
            "other_part": ["Task01_BrainTumour/imagesTr/BRATS_001.nii.gz"],
        },
        ["Task01_BrainTumour/imagesTs/la_003.nii.gz"],
    ),
    (
        "wmh",
        """
        training/Utrecht/11/pre/FLAIR.nii.gz
            Utrecht_11/ses-1/FLAIR
        training/Utrecht/11/pre/T1.nii.gz
            Utrecht_11/ses-1/T1
        training/Singapore/11/pre/T1.nii.gz
            Singapore_11/ses-1/T1
        training/Amsterdam/GE3T/11/pre/FLAIR.nii.gz
            Amsterdam_GE3T_11/ses-1/FLAIR
        old/Amsterdam/Train_GE3T/12/pre/FLAIR.nii.gz
            Amsterdam_GE3T_12/ses-1/FLAIR
        old/Utrecht/Train/12/pre/FLAIR.nii.gz
            Utrecht_12/ses-1/FLAIR
        loose/Utrecht/13/pre/FLAIR.nii.gz
            Utrecht_13/ses-1/FLAIR
        """,
        {
            "label": [
                "additional_annotations/observer_o3/training/Utrecht/11/result.nii.gz",
                "old/Utrecht/Train/12/pre/wmh.nii.gz",
                "training/Utrecht/11/wmh.nii.gz",
            ],
            "other_part": [
                "old/Utrecht/Test/14/pre/FLAIR.nii.gz",
                "test/Amsterdam/Philips_VU .PETMR_01./160/pre/FLAIR.nii.gz",
            ],
            "not_preprocessed": ["training/Utrecht/11/orig/3DT1.nii.gz", "training/Utrecht/11/orig/FLAIR.nii.gz"],
        },
        ["training/Utrecht/11/pre/3DT1.nii.gz"],
    ),
    (
        "isles2022",
        """
        ISLES-2022/sub-strokecase0001/ses-0001/anat/sub-strokecase0001_ses-0001_FLAIR.nii.gz
            sub-strokecase0001/ses-0001/FLAIR
        ISLES-2022/ISLES-2022/sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_ADC.nii.gz
            sub-strokecase0001/ses-0001/ADC
        images/sub-strokecase0002/ses-0001/dwi/sub-strokecase0002_ses-0001_dwi.nii.gz
            sub-strokecase0002/ses-0001/DWI
        rawdata/sub-strokecase0003/ses-0001/sub-strokecase0003_ses-0001_flair.nii.gz
            sub-strokecase0003/ses-0001/FLAIR
        flat/sub-strokecase0004_ses-0001_adc.nii.gz
            sub-strokecase0004/ses-0001/ADC
        """,
        {
            "label": [
                "ISLES-2022/derivatives/sub-strokecase0001/ses-0001/sub-strokecase0001_ses-0001_msk.nii.gz",
                "labels_derivatives/sub-strokecase0002/ses-0001/sub-strokecase0002_ses-0001_flair.nii.gz",
            ]
        },
        ["rawdata/sub-strokecase0003/ses-0001/readme.nii"],
    ),
    (
        "msseg1",
        """
        MSSEG/training/Center_01/Patient_01/Preprocessed_Data/FLAIR_preprocessed.nii.gz
            Center_01_Patient_01/ses-1/FLAIR
        MSSEG/training/Center_01/Patient_01/Preprocessed_Data/DP_preprocessed.nii.gz
            Center_01_Patient_01/ses-1/PD
        MSSEG/training/Center_07/Patient_01/Preprocessed_Data/GADO_preprocessed.nii.gz
            Center_07_Patient_01/ses-1/T1ce
        MSSEG/training/Center_07/Patient_01/Preprocessed_Data/T1_preprocessed.nii.gz
            Center_07_Patient_01/ses-1/T1
        MSSEG/training/Center_07/Patient_01/Preprocessed_Data/T2_preprocessed.nii.gz
            Center_07_Patient_01/ses-1/T2
        """,
        {
            "label": ["MSSEG/training/Center_01/Patient_01/Masks/Consensus.nii.gz"],
            "other_part": ["MSSEG/Testing/Center_03/Patient_01/Preprocessed_Data/T1_preprocessed.nii.gz"],
            "not_preprocessed": ["MSSEG/training/Center_01/Patient_01/Raw_Data/T1.nii.gz"],
        },
        ["MSSEG/training/Center_01/Patient_01/Preprocessed_Data/brain.nii.gz"],
    ),
    (
        "oasis3",
        """
        OAS30001_MR_d0129/anat1/sub-OAS30001_ses-d0129_run-01_T1w.nii.gz
            OAS30001/d0129/T1-anat1-run-01
        OAS30001_MR_d0129/anat2/NIFTI/sub-OAS30001_ses-d0129_run-02_T1w.nii.gz
            OAS30001/d0129/T1-anat2-run-02
        x/OAS30001_MR_d0757/scans/anat3-TSE/resources/NIFTI/files/sub-OAS30001_sess-d0757_acq-TSE_T2w.nii.gz
            OAS30001/d0757/T2-anat3-acq-TSE
        OAS30002_MR_d0001/anat4/sub-OAS30002_ses-d0001_angio.nii.gz
            OAS30002/d0001/TOF-anat4-angio
        OAS30002_MR_d0001/swi1/sub-OAS30002_ses-d0001_swi.nii.gz
            OAS30002/d0001/SWI-swi1
        OAS30002_MR_d0001/anat5/sub-OAS30002_ses-d0001_GRE.nii.gz
            OAS30002/d0001/T2star-anat5-GRE
        OAS30002_MR_d0001/anat6/sub-OAS30002_ses-d0001_T2star.nii.gz
            OAS30002/d0001/T2star-anat6
        OAS30002_MR_d0001/dwi1/sub-OAS30002_ses-d0001_dwi.nii.gz
            OAS30002/d0001/DWI-dwi1
        """,
        {
            "description": [
                "OAS30002_MR_d0001/fmap1/sub-OAS30002_ses-d0001_fieldmap.nii.gz",
                "OAS30002_MR_d0001/func1/sub-OAS30002_ses-d0001_bold.nii.gz",
            ],
            "minip": ["OAS30002_MR_d0001/swi2/sub-OAS30002_ses-d0001_minIP.nii.gz"],
            "not_mr": ["OAS30001_AV45_PETCT_d2430/anat1/sub-OAS30001_ses-d2430_T1w.nii.gz"],
            "freesurfer": ["OAS30001_Freesurfer53_d0129/anat1/sub-OAS30001_ses-d0129_T1w.nii.gz"],
        },
        ["OAS40001_MR_d3132/anat1/sub-OAS40001_ses-d3132_T1w.nii.gz"],
    ),
    (
        "oasis4",
        """
        OAS42510/OAS42510_MR_d3132/anat1/NIFTI/sub-OAS42510_sess-d3132_T1w.nii.gz
            OAS42510/d3132/T1-anat1
        OAS42510_MR_d3133/fmap1/sub-OAS42510_sess-d3133_FLAIR.nii.gz
            OAS42510/d3133/FLAIR-fmap1
        """,
        {"description": ["OAS42510_MR_d3133/func1/sub-OAS42510_sess-d3133_bold.nii.gz"]},
        [],
    ),
    (
        "adni",
        """
        ADNI/002_S_0295/MP-RAGE/LONI/S13408/ADNI_002_S_0295_MR_MP-RAGE__br_raw_2006_1_S13408_I13722.nii
            002_S_0295/2006-04-18/T1-I13722
        ADNI/002_S_0295/MP-RAGE REPEAT v1.2/LONI/S13407/ADNI_002_S_0295_MR_MP-RAGE_br_raw_2_S13407_I13721.nii.gz
            002_S_0295/2006-04-18/T1-I13721
        part 2/ADNI/002_S_0295/Axial_T2-Star/LONI/I99/nested/ADNI_002_S_0295_MR_T2Star_br_raw_1_S1_I99.nii
            002_S_0295/2006-04-18/T2star-I99
        ADNI/941_S_10001/Axial_T2_FLAIR/LONI/I100/converted.nii
            941_S_10001/2006-04-18/FLAIR-I100
        ADNI/941_S_10001/Localizer/LONI/I101/converted.nii
            941_S_10001/2006-04-18/UNKNOWN-I101
        """,
        {"not_mr": ["ADNI/002_S_0295/FDG/LONI/I5/ADNI_002_S_0295_PT_FDG_br_raw_1_S5_I5.nii"]},
        ["ADNI/002_S_0295/MP-RAGE/a.nii"],
    ),
    (
        "ppmi",
        """
        PPMI/3000/SAG_T1_3D/LONI/S1/PPMI_3000_MR_SAG_T1_3D__br_raw_2011_1_S1_I201.nii
            3000/2006-04-18/T1-I201
        PPMI/3000/MPRAGE_GRAPPA/LONI/S2/nifti/PPMI_3000_MR_MPRAGE_br_raw_2011_1_S2_I202.nii
            3000/2006-04-18/T1-I202
        PPMI/3001/T2_in_T1-anatomical/LONI/S3/PPMI_3001_MR_T2_br_raw_2011_1_S3_I203.nii.gz
            3001/2006-04-18/T2-I203
        PPMI/3001/DTI_GRE/LONI/S4/PPMI_3001_MR_DTI_br_raw_2011_1_S4_I204.nii.gz
            3001/2006-04-18/T2star-I204
        """,
        {
            "description": [
                "PPMI/3000/2D_GRE-T1/LONI/S5/PPMI_3000_MR_a_br_raw_1_S5_I5.nii",
                "PPMI/3000/Localizer/LONI/S6/PPMI_3000_MR_a_br_raw_1_S6_I6.nii",
                "PPMI/3000/MT_T1/LONI/S7/PPMI_3000_MR_a_br_raw_1_S7_I7.nii",
                "PPMI/3000/T1_REPEAT/LONI/S8/PPMI_3000_MR_a_br_raw_1_S8_I8.nii",
                "PPMI/3000/T2_FLAIR_SPACE/LONI/S9/PPMI_3000_MR_a_br_raw_1_S9_I9.nii",
            ],
            "not_mr": ["PPMI/3000/DaTscan_T1/LONI/S10/PPMI_3000_NM_DaT_br_raw_1_S10_I10.nii"],
        },
        [],
    ),
    (
        "bids",
        """
        sub-01/anat/sub-01_T1w.nii.gz
            sub-01/ses-1/T1
        sub-01/anat/sub-01_run-1_T2w.nii.gz
            sub-01/ses-1/T2-run-1
        sub-01/anat/sub-01_run-2_T2w.nii.gz
            sub-01/ses-1/T2-run-2
        sub-02/ses-pre/anat/sub-02_ses-pre_acq-mp2rage_T1w.nii
            sub-02/ses-pre/T1-acq-mp2rage
        sub-02/ses-pre/anat/sub-02_ses-pre_inplaneT1.nii
            sub-02/ses-pre/T1-inplaneT1
        sub-02/ses-pre/dwi/sub-02_ses-pre_dwi.nii.gz
            sub-02/ses-pre/DWI
        sub-03/ses-1/anat/flair.nii.gz
            sub-03/ses-1/FLAIR
        """,
        {
            "derivative": ["derivatives/fs/sub-01/anat/sub-01_T1w.nii.gz"],
            "datatype": ["sub-01/fmap/sub-01_magnitude1.nii.gz", "sub-01/func/sub-01_task-rest_bold.nii.gz"],
            "label": ["sub-01/anat/sub-01_T1w_mask.nii.gz"],
        },
        ["other/scan.nii"],
    ),
    (
        "fomo60k",
        """
        sub_1/ses_1/t1.nii.gz
            sub_1/ses_1/T1
        sub_1/ses_1/t1_2.nii.gz
            sub_1/ses_1/T1-t1_2
        sub_1/ses_2/scan.nii.gz
            sub_1/ses_2/UNKNOWN-scan
        PT001_OASIS1/sub_1/ses_1/flair.nii.gz
            PT001_OASIS1_sub_1/ses_1/FLAIR
        """,
        {"label": ["sub_1/ses_1/brain_mask.nii.gz"]},
        ["group.nii.gz"],
    ),
]
